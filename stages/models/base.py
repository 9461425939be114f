"""What a model family must say, so that stages can prune it one block at a time.

T: tokens of a sample.    H: hidden size.    V: vocabulary.    G: patches on a side.    N: samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stages.formats.file_digest import FileDigest, digest_file
from stages.formats.tensor_parts import TensorPart
from stages.models.deciding_files import decides

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.interfaces import Samples
    from stages.machine.device import DeviceChoices

Part = Literal["enter", "leave", "all"]


@dataclass(frozen=True)
class ModelFolder:
    """A folder on this machine that holds a whole model, and where it came from."""

    name: str  # as the user named it, or its hub name
    path: Path
    source: str  # "hub", "folder", "pickle", "gguf", "wheel"
    revision: str | None  # commit of the hub
    trusts_code: bool = False  # whether Python code that comes with the model may be run
    left_out: tuple[str, ...] = ()  # files and folders beside the weights that an export does not take along

    @cached_property
    def files(self) -> dict[str, FileDigest]:
        """Size and sha256 of every file that decides what the model computes."""
        decide = (path for path in self.path.iterdir() if decides(path.name, trusts_code=self.trusts_code))
        names = sorted(path.name for path in decide if not path.is_dir())
        return {name: digest_file(self.path / name) for name in names}


@dataclass(frozen=True)
class LayerInfo:
    """A layer of a block that can be pruned."""

    name: str  # in the whole model, without ".weight": "model.layers.0.self_attn.q_proj"
    path: str  # in its block: "self_attn.q_proj"
    role: str | None  # "q", "k", "v", "qkv", "out", "gate", "up", "fc1", "fc2", "vital"; None: not in the table
    rows: int  # output features
    cols: int  # input features
    transposed: bool  # stored as (cols, rows), as GPT-2's Conv1D does
    peers: str | None = None  # an expert's layer: one name for the same layer of all experts of the block
    token_share: float = 1.0  # the share of the tokens that it gets, on average

    @property
    def expert(self) -> str | None:
        """The expert of the layer, in its block: "mlp.experts.3"; None: it is no expert's."""
        if self.peers is None:
            return None
        before = self.peers.partition("*")[0]
        return before + self.path.removeprefix(before).partition(".")[0]


@dataclass(frozen=True)
class BlockCall:
    """The arguments that a block gets beside the hidden state: masks, position embeddings and the like."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def float(self) -> BlockCall:
        """The same with its floating-point tensors in fp32."""
        args, kwargs = tree_map_only(Tensor, _in_fp32, (self.args, dict(self.kwargs)))
        return BlockCall(args, kwargs)


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Entry:
    """Samples on their way in."""

    hidden: Tensor  # (N, T, H), of images (N, G, G, H): the input of block 0
    calls: tuple[BlockCall, ...]  # one per block


class Ends(Protocol):
    """The model without its blocks: embeddings before them, final norm and head after them."""

    def enter(self, inputs: Tensor) -> Entry:
        """What the blocks get for `inputs`: token ids (N, T), or pixels (N, 3, S, S)."""
        ...

    def leave(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """Logits (N, T, V), or image embeddings, from the last block's output. Needs the part "leave" or "all"."""
        ...


class Weights(Protocol):
    """The weights of a whole model, by their names in its files, each read when it is asked for."""

    def __contains__(self, key: str) -> bool: ...

    @property
    def keys(self) -> Iterable[str]:
        """All names."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which the tensor is stored."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape."""
        ...

    def load(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A copy of the tensor; a floating-point tensor in `dtype`, if one is given."""
        ...


@runtime_checkable
class StoresParts(Protocol):
    """A `BlockModel` whose files hold several entries of a block's state in one tensor, or some of them transposed."""

    def stored_parts(self, block_index: int) -> Mapping[str, TensorPart]:
        """For each entry of a block's state, where it lies in the model's own files."""
        ...


class BlockInputs(Protocol):
    """What the blocks get beside the hidden state. `stages.models.block_inputs` implements it for every family."""

    def depend_on_inputs(self, example: Tensor, choices: DeviceChoices) -> bool:
        """Whether they differ between inputs of one shape. example: the inputs (1, ...) of one sample."""
        ...

    def of(self, inputs: Tensor, choices: DeviceChoices) -> tuple[BlockCall, ...]:
        """One call for each block. inputs: a batch (N, ...) on the device."""
        ...


def stored_parts(model: BlockModel, block_index: int) -> Mapping[str, TensorPart]:
    """Where each entry of a block's state lies in the model's files; for most families a tensor of its own."""
    if isinstance(model, StoresParts):
        return model.stored_parts(block_index)
    return {name: TensorPart(key) for name, key in model.stored_names(block_index).items()}


def tokens_of(model: BlockModel, samples: Samples) -> int:
    """How many tokens each of the samples has, as far as the work on them goes."""
    return math.prod(model.hidden_shape(tuple(samples[0].shape))[:-1])


class BlockModel(Protocol):
    """A model whose weights stay on disk, except those of one block and of the ends."""

    name: str  # the family: transformers' `config.model_type`
    task: str  # a name of `stages.tasks.registry.TASKS`
    source: ModelFolder
    weights: Weights  # every tensor of the model's own files, whether it is used here or not
    num_blocks: int
    hidden_size: int  # numbers of a token that blocks hand on: H, and shared keys and values where there are some
    vocab_size: int  # rows of the embedding matrix
    max_positions: int | None  # None: as many as one likes
    fixed_tokens: int | None  # of a sample, where the model leaves no choice
    input_bytes_per_token: int  # of a sample as the calibration set keeps it
    has_other_forms: bool  # whether an exported folder holds the model a second time, in another form
    attention_numbers: int  # that a block's attention writes out for one sample; 0: its scores are never whole

    @property
    def outside_numbers(self) -> int:
        """Numbers of what lies outside the blocks: embeddings, final norm, head."""
        ...

    def hidden_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a sample's hidden state, by that of its inputs: (T, H), (G, G, H)."""
        ...

    def layers(self, block_index: int) -> tuple[LayerInfo, ...]:
        """The layers of a block that can be pruned, in the order of the module."""
        ...

    def load_block(
        self, block_index: int, device: torch.device, dtype: torch.dtype = ..., state: Mapping[str, Tensor] | None = ...
    ) -> nn.Module:
        """The block with its weights from disk, or from `state` (names relative to the block), ready to run."""
        ...

    def run_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        """The block's output (1, T, H), whatever it wraps it in."""
        ...

    def load_ends(self, device: torch.device, part: Part = ...) -> Ends:
        """Embeddings ("enter"), or all that lies outside the blocks ("leave", "all"); kept until `drop_ends`."""
        ...

    def drop_ends(self) -> None:
        """Free what `load_ends` keeps. The caller has given up its own references."""
        ...

    def calls(self, device: torch.device) -> BlockInputs:
        """What the blocks get beside the hidden state: one object per device, which remembers."""
        ...

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        """The layer's weight as (rows, cols)."""
        ...

    def set_weight_matrix(self, layer: nn.Module, weight: Tensor) -> None:
        """Overwrite the layer's weight, given as (rows, cols)."""
        ...

    def stored_names(self, block_index: int) -> dict[str, str]:
        """For each entry of a block's state, its name in the model's own files."""
        ...

    def entry_sizes(self, block_index: int) -> dict[str, int]:
        """For each entry of a block's state, how many numbers it holds."""
        ...

    def original_dtypes(self, block_index: int) -> dict[str, torch.dtype]:
        """For each entry of a block's state, its dtype in the model's own files."""
        ...

    def unused_weights(self) -> tuple[str, ...]:
        """Names of the weights in the model's own files that no forward here reads: further heads, other towers."""
        ...

    def other_forms(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Callable[[IO[bytes]], None]]]:
        """Further files of the whole exported model: (file name, what writes it).

        tensors: the exported weights, by their names in the model's own files.
        """
        ...

    def export_extras(self, requested_dtype: str) -> Iterable[tuple[str, bytes]]:
        """What a model folder needs beside weights: configuration and tokenizer, as (file name, contents)."""
        ...


# Gives the block of an index, ready to run inside the context: always the same object, because some keep a state.
Fetch = Callable[[int], AbstractContextManager[nn.Module]]


@runtime_checkable
class GeneratesText(BlockModel, Protocol):
    """A `BlockModel` that can write on what it reads, as its own library runs it."""

    can_generate: bool  # False where its library's own loop over the tokens fails
    cache_numbers_per_token: int  # about how many numbers of a token all blocks keep for the tokens after it

    def generation_model(self, device: torch.device, fetch: Fetch) -> PreTrainedModel:
        """The whole model with its ends on the device, which gets each block from `fetch` whenever it is to run."""
        ...
