"""Stand-ins for a model's blocks: the model's own forward runs, and tells what it would have given each block.

The arguments of a block change between versions of transformers and between layers of one model (sliding against
global attention), so nothing here makes them up: they are recorded where the model itself makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from stages.models.base import BlockCall

# How many values a block returns, by its class; None: the hidden state itself, not in a tuple.
Returns = Mapping[type[nn.Module], int | None]


class StopForward(Exception):
    """Ends a model's forward once its last block has been called."""


class Tape:
    """What the recorders of one model share during one forward."""

    def __init__(
        self,
        returns: Returns,
        output: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        others: Callable[[nn.Module, int], tuple[Any, ...]] = lambda _block, count: (None,) * count,
    ) -> None:
        """Prepare the recorders.

        Args:
            returns: What the blocks return.
            output: Makes the hidden state that a recorder returns of the one that it gets. Default: the same one.
            others: Makes the values that a recorder returns beside it, of the block and their number. Default: None.
        """
        self.returns = returns
        self._others = others
        self.calls: list[BlockCall] = []
        self.hidden: list[Tensor] = []  # what each block got
        self.blocks: list[nn.Module] = []  # that were called
        self._output = output
        self._num_blocks = 0
        self._last_output: Tensor | None = None

    def start(self, num_blocks: int, last_output: Tensor | None) -> None:
        """Begin a forward; the last block returns `last_output`, or ends the forward if that is None."""
        self.calls, self.hidden, self.blocks = [], [], []
        self._num_blocks, self._last_output = num_blocks, last_output

    def visit(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one block's call and return what the loop of the model expects of this block."""
        hidden, call = split_call(args, kwargs)
        self.hidden.append(hidden)
        self.calls.append(call)
        self.blocks.append(block)
        is_last = len(self.calls) == self._num_blocks
        if is_last and self._last_output is None:
            raise StopForward
        output = self._last_output if is_last else self._output(hidden)
        num_values = self.returns[type(block)]
        return output if num_values is None else (output, *self._others(block, num_values - 1))


class Visitor(Protocol):
    """What a recorder does with a call of the block that it stands for."""

    def visit(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the loop of the model expects of this block."""
        ...


class Recorder(nn.Module):
    """Stands where a block stood; has its attributes, since the model's loop reads some (`attention_type`)."""

    def __init__(self, original: nn.Module, visitor: Visitor) -> None:
        super().__init__()
        # In a tuple, so that it does not become a submodule and its weights none of ours.
        self._stands_for = (original, visitor)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, visitor = self._stands_for
        return visitor.visit(original, args, kwargs)


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """A block's hidden state, and the rest of its arguments."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def output_of(returned: Any) -> Tensor:
    """The hidden state in what a block returned: itself, or the first of a tuple."""
    return returned if isinstance(returned, Tensor) else returned[0]
