"""One entry of the census: a tiny configuration of a model family, and what lampctl is expected to do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf

from tests.small_models import VOCAB, tokenizer

Kind = Literal[
    "dense",
    "GQA",
    "sliding window",
    "post-norm",
    "parallel",
    "MoE",
    "hybrid state",
    "shared KV",
    "multimodal",
    "image encoder",
    "segmentation",
    "encoder",
    "encoder-decoder",
]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Sizes that a table's row does not name are those of the published model. The memory and time of a run grow with the
# cube of the widest matrix: one of 8192 channels takes longer than a test may.
_WIDEST = 2048


@dataclass(frozen=True)
class Verdict:
    """What lampctl does with a model.

    "works": all steps, and the exported model is what it should be. "refused": exit code 2 before any work, by a
    message.
    """

    word: Literal["works", "refused"]
    message: str = ""  # a regular expression that the message of the refusal matches
    reason: str = ""  # of the refusal, or what to know of a model that works, for docs/models.md


WORKS = Verdict("works")


@dataclass(frozen=True)
class Configuration:
    """A model family, tiny."""

    name: str  # unique in the census; the model_type, with a suffix for a second configuration of a family
    kind: Kind
    config: Callable[[], tf.PreTrainedConfig] | None = None
    saved: Callable[[Path], Path] | None = None  # where there is no `config`: writes the folder, and returns it
    verdict: Verdict = WORKS

    def save(self, folder: Path) -> Path:
        """The model as a folder like one from the hub."""
        if self.saved is not None:
            return self.saved(folder)
        self.model().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    def model(self) -> tf.PreTrainedModel:
        """A model with random weights, whose zeros and ones are disturbed (a lost bias of zeros would go unseen)."""
        assert self.config is not None
        config = self.config()
        torch.manual_seed(0)
        opener = tf.AutoModelForCausalLM
        if config.is_encoder_decoder:
            opener = tf.AutoModelForSeq2SeqLM
        model = opener.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
            for name, buffer in model.named_buffers():
                if name.endswith(("e_score_correction_bias", "layer_scalar")):
                    buffer.add_(0.02 * torch.randn(buffer.shape))
                elif name.endswith("tid2eid"):  # DeepSeek-V4: the experts of each token of the vocabulary
                    buffer.copy_(torch.rand(len(buffer), 4).argsort(-1)[:, : buffer.shape[1]])
        _require_tiny(self.name, model)
        return model.eval()


def _require_tiny(name: str, model: torch.nn.Module) -> None:
    """Raise AssertionError, naming the weight, if a matrix is wider than a run of a few seconds allows."""
    widest, key = max((max(p.shape[-2:]), key) for key, p in model.named_parameters() if p.ndim >= 2)
    assert widest <= _WIDEST, f"{name} is not tiny: {key} has a side of {widest}, and {_WIDEST} is the most"


def tiny(model_type: str, *, without: str = "", **changes: Any) -> Callable[[], tf.PreTrainedConfig]:
    """The family's configuration with small sizes.

    Args:
        model_type: As transformers calls the family.
        without: Names of common sizes, separated by spaces, that the family does not have.
        changes: Settings of this family.
    """

    def build() -> tf.PreTrainedConfig:
        sizes = {name: value for name, value in _COMMON.items() if name not in without.split()}
        return tf.AutoConfig.for_model(model_type, **{**sizes, **changes})

    return build
