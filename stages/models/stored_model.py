"""What every model with weights on disk does alike: its blocks are loaded, run and named one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Generic, TypeVar

import torch
from torch import Tensor, nn

from stages.formats.tensor_parts import TensorPart, gather
from stages.models.base import BlockCall, Ends, LayerInfo, ModelFolder, Part, Weights
from stages.models.block_inputs import CachedBlockInputs
from stages.models.block_layers import matrix_of
from stages.models.layer_roles import role_of
from stages.models.meta_init import copied, materialised

E = TypeVar("E", bound=Ends)


class StoredModel(ABC, Generic[E]):
    """Base of the built-in `stages.models.base.BlockModel`s. A subclass finds the blocks and where their weights lie.

    Args:
        folder: Where the model comes from.
        weights: Every tensor of the model's own files.
    """

    task: str
    has_other_forms = False
    attention_numbers: int = 0  # torch's fused attention
    num_blocks: int
    hidden_size: int
    # A subclass sets these when it opens a model.
    _blocks: tuple[nn.Module, ...]  # on `meta`
    _blocks_path: str  # where the list of blocks is in the model: "model.layers"
    _layers: tuple[tuple[LayerInfo, ...], ...]  # of each block
    _stored: dict[str, str]  # for each weight of the model, its name in the files

    def __init__(self, folder: ModelFolder, weights: Weights) -> None:
        self.source, self.weights = folder, weights
        self._parts: dict[str, TensorPart] = {}  # weights that are a part of a tensor in the files
        self._ends: tuple[torch.device, Part, E] | None = None
        self._calls: dict[torch.device, CachedBlockInputs] = {}

    # -- what is in it

    def layers(self, block_index: int) -> tuple[LayerInfo, ...]:
        return self._layers[block_index]

    def stored_names(self, block_index: int) -> dict[str, str]:
        return {name: part.key for name, part in self.stored_parts(block_index).items()}

    def stored_parts(self, block_index: int) -> dict[str, TensorPart]:
        prefix = self._prefix(block_index)
        return {
            name: self._parts.get(prefix + name) or TensorPart(self._stored.get(prefix + name, prefix + name))
            for name in self._blocks[block_index].state_dict()
        }

    def entry_sizes(self, block_index: int) -> dict[str, int]:
        return {name: tensor.numel() for name, tensor in self._blocks[block_index].state_dict().items()}

    @property
    def outside_numbers(self) -> int:
        keys = {key for name, key in self._stored.items() if not name.startswith(f"{self._blocks_path}.")}
        return sum(math.prod(self.weights.shape(key)) for key in keys)

    def original_dtypes(self, block_index: int) -> dict[str, torch.dtype]:
        state = self._blocks[block_index].state_dict()
        return {
            name: self.weights.dtype(key) if key in self.weights else state[name].dtype
            for name, key in self.stored_names(block_index).items()
        }

    def unused_weights(self) -> tuple[str, ...]:
        used = {*self._stored.values(), *(part.key for part in self._parts.values())}
        return tuple(key for key in self.weights.keys if key not in used)

    def other_forms(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Callable[[IO[bytes]], None]]]:
        yield from ()

    # -- blocks

    def load_block(
        self,
        block_index: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        state: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        if state is None:
            parts = {name: part for name, part in self.stored_parts(block_index).items() if part.key in self.weights}
            state = gather(parts, lambda key: self.weights.load(key, dtype, device))
        else:
            state = {name: copied(tensor, dtype, device) for name, tensor in state.items()}
        return materialised(self._blocks[block_index], state, device, block_index, self.source.name)

    def run_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        out: Tensor = block(hidden, *call.args, **call.kwargs)
        return out

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        return matrix_of(layer)

    @torch.no_grad()
    def set_weight_matrix(self, layer: nn.Module, weight: Tensor) -> None:
        matrix_of(layer).copy_(weight)

    # -- what lies around the blocks

    def calls(self, device: torch.device) -> CachedBlockInputs:
        if device not in self._calls:
            self._calls[device] = CachedBlockInputs(lambda: self.load_ends(device, "enter"), self.drop_ends)
        return self._calls[device]

    def load_ends(self, device: torch.device, part: Part = "all") -> E:
        """The last instance is kept until `drop_ends`: it holds the embeddings."""
        if self._ends is not None and self._ends[0] == device and self._ends[1] in (part, "all"):
            return self._ends[2]
        self._ends = None  # its memory is free before the next one is read
        self._ends = (device, part, self._read_ends(device, part))
        return self._ends[2]

    def drop_ends(self) -> None:
        self._ends = None

    @abstractmethod
    def _read_ends(self, device: torch.device, part: Part) -> E:
        """Read what lies around the blocks from the files."""

    # -- for subclasses

    def _prefix(self, block_index: int) -> str:
        return f"{self._blocks_path}.{block_index}."

    def _linear_layers(self, block_index: int) -> tuple[LayerInfo, ...]:
        """Every linear layer of a block, in the order of the module."""
        return tuple(
            LayerInfo(
                self._prefix(block_index) + path,
                path,
                role_of(path),
                module.out_features,
                module.in_features,
                transposed=False,
            )
            for path, module in self._blocks[block_index].named_modules()
            if isinstance(module, nn.Linear)
        )
