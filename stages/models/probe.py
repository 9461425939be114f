"""What blocks return and hand on, and whether the chain of blocks is the model: found out before a weight is read.

The model's loop runs over recorders, and one block of each class runs by itself, all with random weights that take no
memory. A model is refused here where pruning it block by block would fail later or, worse, measure nothing: where a
token sees those after it, where the loop changes the hidden state between two blocks, or where a block reads what an
earlier one computed and no stream holds.

N: samples.    T: tokens.    H: hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from stages.errors import UsageError
from stages.models.architecture import CAN_BE_PRUNED
from stages.models.base import BlockCall
from stages.models.decoder_ends import forward_to_block, put_recorders
from stages.models.recorder import Returns, StopForward, Tape, output_of
from stages.models.stream_layout import SharedState, StreamLayout

# Blocks with the same are alike: the class, and the names and shapes of the weights.
_Structure = tuple[type[nn.Module], frozenset[tuple[str, torch.Size]]]
_CROSS_ATTENTION = re.compile(r"encoder_attn|cross_?att")
_TOKENS = 4
_CPU = torch.device("cpu")
# Larger ones (experts, embeddings) are zero: pages of memory that nothing writes to.
_MOST_RANDOM = 2**26


@dataclass(frozen=True)
class BlockTraits:
    """What the loop of a model expects of its blocks."""

    returns: Returns
    layout: StreamLayout
    # Linear layers whose weight a block uses without calling them, so that no hook can observe their input.
    uncalled: frozenset[str]  # by their name in the model


def probed(model: PreTrainedModel, list_name: str, blocks: tuple[nn.Module, ...], name: str) -> BlockTraits:
    """Find out what the blocks of a model return and hand on.

    Args:
        model: On `meta`, with nothing in the place of its blocks. It is changed.
        list_name: Where the list of blocks is.
        blocks: On `meta`.
        name: Of the model, for messages.

    Raises:
        UsageError: The model cannot be pruned block by block, with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            _fill(model, generator)
            return _Probe(model, list_name, blocks, generator).traits()
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


class _Probe:
    """One probe of one model."""

    def __init__(
        self, model: PreTrainedModel, list_name: str, blocks: tuple[nn.Module, ...], generator: torch.Generator
    ) -> None:
        self._model, self._blocks, self._generator = model, blocks, generator
        self._returns: dict[type[nn.Module], int | None] = {}
        self._uncalled: dict[_Structure, set[str]] = {}
        self._outputs: list[Tensor] = []
        self._list_name = list_name
        self._beside: dict[type[nn.Module], tuple[Any, ...]] = {}  # what a block returned after its hidden state
        self._handed: list[Tensor] = []  # such values that recorders returned
        self._independent: set[_Structure] = set()  # blocks that get such values and do not use them
        self._tape = Tape(self._returns, self._new_output, self._new_values)
        self._layout = StreamLayout(0)
        self._hidden_size: int = model.config.get_text_config().hidden_size
        put_recorders(model, list_name, blocks, self._tape)

    def traits(self) -> BlockTraits:
        self._forward(0)
        self._layout = self._hidden_layout()
        structures = [_structure(block) for block in self._blocks]
        for index, (block, structure) in enumerate(zip(self._blocks, structures, strict=True)):
            if structure not in self._uncalled:
                self._forward(index)
                self._returns[type(block)] = self._num_values(index)
        self._forward_to_head()
        self._require_chain()
        uncalled = (
            f"{self._list_name}.{index}.{path}"
            for index, structure in enumerate(structures)
            for path in self._uncalled[structure]
        )
        return BlockTraits(self._returns, self._with_shared_states(), frozenset(uncalled))

    def _forward(self, block_index: int) -> None:
        """Run the loop until it has called this block, for one sample."""
        self._outputs = []
        with _foreign_code(self._model):
            forward_to_block(self._model, self._tape, block_index, torch.arange(_TOKENS, device=_CPU)[None])

    def _forward_to_head(self) -> None:
        """Run the loop to its end, or until it calls more blocks than there are."""
        self._outputs = []
        head = self._model.get_output_embeddings()
        handle = head.register_forward_pre_hook(_stop) if head is not None else None
        self._tape.start(len(self._blocks) + 1, None)
        with contextlib.suppress(StopForward), _foreign_code(self._model):
            self._model(input_ids=torch.arange(_TOKENS, device=_CPU)[None], use_cache=False)
        if handle is not None:
            handle.remove()

    def _new_output(self, hidden: Tensor) -> Tensor:
        """What a recorder returns: like nothing else, so that it can be recognised."""
        self._outputs.append(_normal(hidden.shape, self._generator))
        return self._outputs[-1]

    def _new_values(self, block: nn.Module, _count: int) -> tuple[Any, ...]:
        """What a recorder returns after the hidden state: like the block's own values, and like nothing else."""
        values: tuple[Any, ...] = tree_map_only(Tensor, Tensor.clone, self._beside[type(block)])
        self._handed += [tensor for tensor in _tensors(values) if tensor.numel()]
        return values

    def _num_values(self, block_index: int) -> int | None:
        """How many values a block returns. Raises UsageError if its output for a token depends on later tokens."""
        block = self._block(block_index)
        uncalled = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        self._uncalled[_structure(block)] = uncalled
        for path in list(uncalled):
            block.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: uncalled.discard(path))
        if block_index in self._blocks_with("is_kv_shared_layer"):
            self._store_shared_states(block_index)
        call = self._tape.calls[block_index]
        packed = _normal((1, _TOKENS, self._layout.width), self._generator)
        changed = packed.clone()
        changed[:, -1] = _normal(changed[:, -1].shape, self._generator)
        with _foreign_code(self._model):
            inputs = (self._layout.hidden(h.clone()) for h in (packed, changed))
            returned, other = (block(hidden, *call.args, **call.kwargs) for hidden in inputs)
            first, second = (self._layout.packed(output_of(r))[:, :-1] for r in (returned, other))
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise UsageError(
                f"in a {type(self._model).__name__} with this config.json, each token sees those after it: this is an "
                f"encoder; {CAN_BE_PRUNED}"
            )
        foreign = next((path for path in sorted(uncalled) if _CROSS_ATTENTION.search(path)), None)
        if foreign is not None:
            raise UsageError(
                f"{foreign} of a {type(self._model).__name__} reads the output of an encoder: this is half of an "
                "encoder-decoder, and only decoder-only language models can be pruned"
            )
        self._beside[type(block)] = () if isinstance(returned, Tensor) else tuple(returned[1:])
        return None if isinstance(returned, Tensor) else len(returned)

    def _require_chain(self) -> None:
        """Raise UsageError unless each block gets what the one before it returned, and nothing else that one made."""
        called = [next(k for k, block in enumerate(self._blocks) if block is other) for other in self._tape.blocks]
        if called != list(range(len(self._blocks))):
            raise UsageError(
                f"the loop of a {type(self._model).__name__} calls its blocks in the order {called}, not each of them "
                "once: such models cannot be pruned block by block"
            )
        known = {id(output): number for number, output in enumerate(self._outputs)}
        for index in range(1, len(self._blocks)):
            hidden = self._tape.hidden[index]
            if hidden is not self._outputs[index - 1] and not torch.equal(hidden, self._outputs[index - 1]):
                raise UsageError(
                    f"the loop of a {type(self._model).__name__} changes the hidden state between block {index - 1} "
                    f"and block {index}: such models cannot be pruned block by block"
                )
            read = next((known[id(t)] for t in _tensors(self._tape.calls[index]) if id(t) in known), None)
            if read is not None:
                raise UsageError(
                    f"block {index} of a {type(self._model).__name__} reads the output of block {read} as well as that "
                    "of the block before it: such models cannot be pruned block by block"
                )
            self._require_nothing_else(index)

    def _require_nothing_else(self, block_index: int) -> None:
        """Raise UsageError if a block's output depends on what another one returned after its hidden state."""
        call = self._tape.calls[block_index]
        structure = _structure(self._blocks[block_index])
        if structure in self._independent or not any(self._is_handed(tensor) for tensor in _tensors(call)):
            return
        block, hidden = self._block(block_index), self._tape.hidden[block_index]
        # Recorders of a run return None in the place of such values.
        without = tree_map_only(
            Tensor, lambda tensor: None if self._is_handed(tensor) else tensor, (call.args, call.kwargs)
        )
        with _foreign_code(self._model):
            first, second = (
                output_of(block(hidden.clone(), *args, **kwargs))
                for args, kwargs in ((call.args, call.kwargs), without)
            )
        if not torch.equal(first, second):
            raise UsageError(
                f"block {block_index} of a {type(self._model).__name__} reads what an earlier block returned beside "
                "its hidden state: such models cannot be pruned block by block"
            )
        self._independent.add(structure)

    def _is_handed(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or is a part of, a value that a recorder returned after the hidden state."""
        place = tensor.untyped_storage().data_ptr()
        return any(place == other.untyped_storage().data_ptr() for other in self._handed)

    def _hidden_layout(self) -> StreamLayout:
        """How the hidden state lies in a stream."""
        shape, size = tuple(self._tape.hidden[0].shape), self._hidden_size
        if len(shape) == 3 and shape[:2] == (1, _TOKENS) and shape[2] % size == 0:
            return StreamLayout(shape[2])  # Qwen4-Exp hands on several hidden states, one after the other
        for order in ((2, 0, 1, 3), (0, 1, 2, 3)):  # Gemma 3n, DeepSeek V4
            if len(shape) == 4:
                usual = [shape[order.index(axis)] for axis in range(4)]
                if (usual[0], usual[1], usual[3]) == (1, _TOKENS, size):
                    return StreamLayout(size, num_hidden=usual[2], order=order)
        raise UsageError(
            f"the blocks of a {type(self._model).__name__} take a hidden state of an unknown shape {shape}"
        )

    def _with_shared_states(self) -> StreamLayout:
        """The layout with the keys and values that blocks write into an argument for later ones."""
        calls = self._tape.calls
        argument = next((name for name, value in calls[0].kwargs.items() if _is_shared(value, name, calls)), "")
        if not argument or not self._blocks_with("is_kv_shared_layer"):
            return replace(self._layout, argument=argument)
        states: MutableMapping[str, Sequence[Tensor]] = calls[0].kwargs[argument]
        self._store_shared_states(len(self._blocks))
        shared = (
            SharedState(key, tuple((tensor.shape[1], tensor.shape[3]) for tensor in states[key]))
            for key in sorted(states)
        )
        return replace(self._layout, argument=argument, shared=tuple(shared))

    def _store_shared_states(self, end: int) -> None:
        """Run the blocks before `end` that write keys and values for later ones: into the argument that all get."""
        for index in self._blocks_with("store_full_length_kv"):
            if index < end:
                call, block = self._tape.calls[index], self._block(index)
                with _foreign_code(self._model):
                    block(self._tape.hidden[index], *call.args, **call.kwargs)

    def _blocks_with(self, attribute: str) -> list[int]:
        """The blocks with a module whose `attribute` is true."""
        return [
            index
            for index, block in enumerate(self._blocks)
            if any(getattr(module, attribute, False) is True for module in block.modules())
        ]

    def _block(self, block_index: int) -> nn.Module:
        block = copy.deepcopy(self._blocks[block_index])
        _fill(block, self._generator)
        return block


@contextlib.contextmanager
def _foreign_code(model: PreTrainedModel) -> Iterator[None]:
    """Raise UsageError where a model's own code fails; an error anywhere else in the probe is a bug of ours."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the blocks of a {type(model).__name__} cannot be run one by one ({type(error).__name__}: {reason})"
        ) from error


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Give a module random weights on the CPU that take almost no memory: the numbers of a matrix overlap."""
    state = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        if parameter.numel() > _MOST_RANDOM:
            state[name] = torch.zeros(shape, dtype=torch.float32, device=_CPU)
        elif parameter.ndim == 2:
            state[name] = (0.1 * _normal((sum(shape),), generator)).as_strided(shape, (1, 1))
        else:
            state[name] = 0.1 * _normal(shape, generator)
    module.load_state_dict(state, strict=False, assign=True)


def _stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    """A hook of the head: what comes after the blocks is not needed."""
    raise StopForward


def _structure(block: nn.Module) -> _Structure:
    return type(block), frozenset((name, parameter.shape) for name, parameter in block.named_parameters())


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=_CPU)


def _is_shared(value: Any, name: str, calls: Sequence[BlockCall]) -> bool:
    """Whether an argument is one empty mapping that all blocks get."""
    is_empty = isinstance(value, MutableMapping) and not value
    return is_empty and all(call.kwargs.get(name) is value for call in calls)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BlockCall):
        yield from _tensors([*value.args, *value.kwargs.values()])
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
