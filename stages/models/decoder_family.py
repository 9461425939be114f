"""Family of the decoder-only language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.models.family import ModelFamily

if TYPE_CHECKING:
    from stages.models.base import BlockModel, ModelFolder


class DecoderFamily(ModelFamily):
    """Every architecture that `AutoModelForCausalLM` opens, by one code path."""

    name = "decoder"
    title = "decoder-only language models"
    help = "Decoder-only language models of transformers: OPT, Llama, Qwen, Gemma, GPT-2 and others."
    task = "language"
    is_fallback = True

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Always: `open` explains why a model of another kind is refused."""
        return True

    @classmethod
    def open(cls, folder: ModelFolder) -> BlockModel:
        from stages.models.decoder import open_model

        return open_model(folder)
