"""Stand-ins for a model's blocks: the model's own forward runs, and tells what it would have given each block.

The arguments of a block change between versions of transformers and between layers of one model (sliding against
global attention), so nothing here makes them up: they are recorded where the model itself makes them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stages.models.base import BlockCall


class StopForward(Exception):  # noqa: N818 - no error: all that was wanted is known
    """Ends a model's forward once its last block has been called."""


class Tape:
    """What the recorders of one model share during one forward."""

    def __init__(self) -> None:
        self.returns_tuple: bool | None = None  # what the blocks return; not known at first
        self.calls: list[BlockCall] = []
        self.first_hidden: Tensor | None = None
        self._num_blocks = 0
        self._last_output: Tensor | None = None

    def start(self, num_blocks: int, last_output: Tensor | None) -> None:
        """Begin a forward; the last block returns `last_output`, or ends the forward if that is None."""
        self.calls, self.first_hidden = [], None
        self._num_blocks, self._last_output = num_blocks, last_output

    def visit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one block's call and return what the loop of the model expects of a block."""
        hidden, call = split_call(args, kwargs)
        if not self.calls:
            self.first_hidden = hidden
        self.calls.append(call)
        is_last = len(self.calls) == self._num_blocks
        if is_last and self._last_output is None:
            raise StopForward
        output = self._last_output if is_last else hidden
        assert self.returns_tuple is not None, "only block 0 can be recorded yet"
        return (output,) if self.returns_tuple else output


class Recorder(nn.Module):
    """Stands where a block stood; has its attributes, since the model's loop reads some (`attention_type`)."""

    def __init__(self, original: nn.Module, tape: Tape) -> None:
        super().__init__()
        # In a tuple, so that it does not become a submodule and its weights none of ours.
        self._stands_for = (original, tape)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._stands_for[1].visit(args, kwargs)


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """A block's hidden state, and the rest of its arguments."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def output_of(returned: Any) -> Tensor:
    """The hidden state in what a block returned: itself, or the first of a tuple."""
    return returned if isinstance(returned, Tensor) else returned[0]
