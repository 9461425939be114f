"""A transformers model that is in memory already, as a model that is pruned block by block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.errors import UsageError
from stages.models.architecture import without_weights
from stages.models.base import ModelFolder
from stages.models.decoder import Decoder

_SOURCE = "memory"


def open_in_memory(model: PreTrainedModel) -> Decoder:
    """The decoder that reads the weights of `model`, which stays as it is.

    Args:
        model: A decoder-only language model of transformers, not quantized, on any device.

    Raises:
        UsageError: The model is none of these, or its weights lie where no pruner reaches them.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or config is None:
        raise UsageError(f"{type(model).__name__} is not a model of transformers (a PreTrainedModel)")
    is_known = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if getattr(config, "is_encoder_decoder", False) or not (is_known or type(model).__name__.endswith("ForCausalLM")):
        raise UsageError(
            f"{type(model).__name__} is not a decoder-only language model: load it by AutoModelForCausalLM"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError("the model is quantized: load the original weights")
    weights = MemoryWeights(model)
    with without_weights():
        empty = type(model)(config)
    unknown = sorted(set(weights.keys) - set(empty.state_dict()))
    if unknown:
        raise UsageError(
            f"the model has weights that its config knows nothing of ({unknown[0]}; {len(unknown)} in all): set the "
            "config to what the model is, or save and load it"
        )
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    decoder = Decoder(ModelFolder(name, Path(name), _SOURCE, None), empty.float(), weights)
    weights.require_own_blocks(decoder.blocks_path)
    return decoder


class MemoryWeights:
    """The weights of a model in memory (`stages.models.base.Weights`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = dict(model.state_dict())
        absent = next((name for name, tensor in self._tensors.items() if tensor.is_meta), None)
        if absent is not None:
            raise UsageError(f"the model's weights are not in memory ({absent} is on the meta device)")

    def require_own_blocks(self, blocks_path: str) -> None:
        """Raise UsageError if two blocks share a tensor: pruning the one would change the other."""
        first: dict[int, str] = {}
        for name, tensor in self._tensors.items():
            if not name.startswith(f"{blocks_path}.") or tensor.numel() == 0:
                continue
            other = first.setdefault(tensor.data_ptr(), name)
            if other != name:
                raise UsageError(f"{other} and {name} are one tensor; copy it: blocks are pruned one after the other")

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    @property
    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        tensor = self._tensors[key]
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device=device or torch.device("cpu"), dtype=wanted, copy=True)
