"""What lies around the blocks of a decoder: the model's own forward, around recorders in place of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import UsageError
from stages.models.base import Entry, Fetch
from stages.models.recorder import Recorder, StopForward, Tape, Visitor
from stages.models.stream_layout import StreamLayout


def put_recorders(model: PreTrainedModel, list_name: str, blocks: tuple[nn.Module, ...], tape: Visitor) -> None:
    """Put a recorder in the place of each block."""
    model.set_submodule(list_name, nn.ModuleList([Recorder(block, tape) for block in blocks]))


class Fetching:
    """Runs a block that is fetched whenever the model calls it, in the place of a `Tape`."""

    def __init__(self, blocks: Sequence[nn.Module], fetch: Fetch) -> None:
        """blocks: those that the recorders stand for."""
        self._index_of, self._fetch = {id(block): index for index, block in enumerate(blocks)}, fetch

    def visit(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block returns."""
        with self._fetch(self._index_of[id(block)]) as fetched:
            return fetched(*args, **kwargs)


def forward_to_block(model: PreTrainedModel, tape: Tape, block_index: int, inputs: Tensor) -> None:
    """Run a model with recorders until it has called block `block_index`.

    Raises:
        UsageError: It does not call its blocks one by one.
    """
    tape.start(block_index + 1, None)
    try:
        model(input_ids=inputs, use_cache=False)
    except StopForward:
        return
    raise UsageError(
        f"{type(model).__name__} calls {len(tape.calls)} of its blocks and not block {block_index}: such models cannot "
        "be pruned block by block"
    )


class DecoderEnds:
    """A `stages.models.base.Ends`."""

    def __init__(self, model: PreTrainedModel, layout: StreamLayout, tape: Tape, num_blocks: int) -> None:
        """Wrap a model.

        Args:
            model: With weights outside the blocks and recorders in their place.
            layout: How the streams hold what the blocks hand on.
            tape: That of the recorders.
            num_blocks: Of the model.
        """
        self._model, self._layout, self._tape, self._num_blocks = model, layout, tape, num_blocks

    def enter(self, inputs: Tensor) -> Entry:
        forward_to_block(self._model, self._tape, self._num_blocks - 1, inputs)
        return Entry(self._layout.packed(self._tape.hidden[0]), tuple(self._tape.calls))

    def leave(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        self._tape.start(self._num_blocks, self._layout.hidden(hidden))
        logits: Tensor = self._model(input_ids=inputs, use_cache=False).logits
        return logits
