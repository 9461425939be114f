"""Family of the image encoders of transformers: ViT, DINOv2, and the vision tower of CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.models.family import ModelFamily

if TYPE_CHECKING:
    from stages.models.base import BlockModel, ModelFolder


class ImageFamily(ModelFamily):
    """Image encoders whose blocks see all patches of a picture at once, with or without a head."""

    name = "image-encoder"
    title = "image encoders"
    help = "ViT, DINOv2 and the vision tower of CLIP; heads and CLIP's text tower stay as they are."
    task = "vision-features"

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in ("vit", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model")

    @classmethod
    def open(cls, folder: ModelFolder) -> BlockModel:
        from stages.models.image_encoder import ImageEncoder

        return ImageEncoder(folder)
