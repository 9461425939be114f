"""A folder of pictures without annotations as a data source."""

from __future__ import annotations

from dataclasses import dataclass

from stages.data.image_source import ImageRecord, ImageSource, Skipped


@dataclass(frozen=True)
class ImageFolder(ImageSource):
    """Pictures alone, in a folder and the folders below: for calibration, and for metrics that need no annotation."""

    kind = "images"
    title = "image folder"
    help = "Pictures without annotations, in a folder and the folders below."
    has_masks = False

    def records(self) -> tuple[list[ImageRecord], Skipped]:
        files, skipped = self._image_files()
        return [ImageRecord(path, None) for path in files], skipped
