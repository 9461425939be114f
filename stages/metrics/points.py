"""Where in a segmentation mask the one point is that asks for it. The settings name it without importing a metric."""

from typing import Literal

# "auto": the annotation's own point where there is one, else the interior one.
Points = Literal["auto", "annotation", "interior", "random", "box-center"]
