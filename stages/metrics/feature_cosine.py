"""Feature cosine: how far pruning turned the features that a model gives to a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Interval

from stages.metrics.base import EvaluationProtocol, Measurement, Metric, MetricContext
from stages.metrics.details import Count, Details

if TYPE_CHECKING:
    from stages.data.base import DataSource
    from stages.models.base import BlockModel


@dataclass(frozen=True)
class FeatureDetails(Details):
    """The pictures whose features were compared."""

    num_images: Count
    lowest: Annotated[float, Interval(ge=-1, le=1)]  # of one picture
    skipped: Mapping[str, Count]  # pictures that could not be used, by reason

    unit: ClassVar[str] = "images"

    @property
    def amount(self) -> int:
        return self.num_images

    def described(self, *, is_partial: bool) -> str:
        return f"{self.num_images} images" + (", partial" if is_partial else "")


class FeatureCosine(Metric):
    """Mean over pictures of the cosine between a model's features and the original model's: 1 for the original."""

    name = "feature_cosine"
    title = "feature cosine"
    help = "Mean cosine between the features of a picture and those that the original model gives it."
    task = "vision-features"
    digits = 4
    higher_is_better = True
    least, most = -1.0, 1.0
    details = FeatureDetails

    def require_measurable(self, model: BlockModel, source: DataSource, protocol: EvaluationProtocol) -> None:

        from stages.data.base import require_contents
        from stages.data.image_source import ImageSource

        require_contents(source, ImageSource.contents, model)

    def measure(self, context: MetricContext) -> Measurement:
        from stages.metrics.image_features import feature_cosines

        found = feature_cosines(context)
        details = FeatureDetails(len(found.cosines), min(found.cosines), found.skipped)
        return Measurement(self.name, found.mean, context.source.name, found.is_partial, details)
