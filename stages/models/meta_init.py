"""From a module on `meta` and weights on disk to a module that runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.errors import DamagedFileError, UsageError
from stages.formats.tensor_reading import PLAIN_DTYPES
from stages.models.base import Weights


def materialised(
    block: nn.Module, state: Mapping[str, Tensor], device: torch.device, block_index: int, model: str
) -> nn.Module:
    """A copy of `block` (on `meta`) with the weights of `state`, in eval mode, on the device, without gradients.

    Buffers that `state` lacks keep the value that the model computed for them. model: its name, for messages.
    Raises DamagedFileError for weights of another shape or name, UsageError for an entry that nothing fills.
    """
    block = copy.deepcopy(block)
    whole = {**{name: buffer for name, buffer in block.state_dict().items() if not buffer.is_meta}, **state}
    try:
        block.load_state_dict(whole, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise DamagedFileError(f"the weights of block {block_index} are not those of such a block: {reason}") from error
    block.to(device)
    require_materialised(block, f"block {block_index} of {model}")
    return block.eval().requires_grad_(False)


def require_plain(weights: Weights, key: str, folder: Path) -> None:
    """Raise UsageError for a weight that is stored as codes of a quantized model."""
    if weights.dtype(key) not in PLAIN_DTYPES:
        kind = str(weights.dtype(key)).removeprefix("torch.")
        raise UsageError(f"{folder}: {key} is stored as {kind}; load a model that is not quantized")


def copied(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """In memory that torch allocated, floating point in `dtype`."""
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    if device.type == "cpu":
        return tensor.to(dtype=wanted, copy=True)
    return tensor.to(device, copy=True).to(wanted)  # an accelerator converts what it gets: fewer bytes are sent there


def require_materialised(module: nn.Module, what: str, recurse: bool = True) -> None:
    """Raise UsageError, naming them, if weights or buffers of the module hold no numbers."""
    tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise UsageError(f"{what}: nothing in its files fills {', '.join(empty)}")
