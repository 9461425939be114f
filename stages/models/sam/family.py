"""Family of the Segment Anything models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.models.family import ModelFamily

if TYPE_CHECKING:
    from stages.models.base import BlockModel, ModelFolder


class SamFamily(ModelFamily):
    """Segment Anything in the form of transformers' `SamModel`: the blocks of its image encoder."""

    name = "sam"
    title = "Segment Anything"
    help = "Segment Anything, ViT-B, ViT-L and ViT-H: the image encoder is pruned."
    task = "vision"

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "sam"

    @classmethod
    def open(cls, folder: ModelFolder) -> BlockModel:
        from stages.models.sam.encoder import SamEncoder

        return SamEncoder(folder)
