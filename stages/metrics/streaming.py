"""Run a model on windows of text with one block in memory at a time, and score each window by its logits.

T: tokens of a window.    H: hidden size.    V: vocabulary.    n: windows.    S: tokens of a slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.data.bos import Framing
from stages.data.text_source import Bos, TextSource
from stages.data.tokenization import evaluation_tokens, load_tokenizer, require_vocabulary
from stages.interfaces import Checkpoint, Stream
from stages.machine.device import computing
from stages.metrics.base import MetricContext
from stages.metrics.language import TextDetails
from stages.metrics.language import windows as cut
from stages.models.base import Ends
from stages.runtime.block_runner import BlockRunner, micro_batches
from stages.runtime.logit_slices import token_slices
from stages.runtime.prefetch import Reading, Writing

# Windows that pass through a block before the next is loaded: many, since each block is read once for them all.
_TOKENS_AT_ONCE = 64 * 2048


class TokenScore(Protocol):
    """Scores the model's predictions of next tokens. A window's score is their mean."""

    name: str  # of the value that progress shows

    def total(self, logits: Tensor, following: Tensor) -> float:
        """The sum of the scores of S predictions. logits: (S, V); following: the tokens that follow, (S,)."""
        ...

    def mean(self, values: Sequence[float]) -> float:
        """The metric over these windows."""
        ...


@dataclass(frozen=True)
class TextWindows:
    """The windows of a text that are read, and how much of it they are."""

    windows: Tensor  # token ids (n, T)
    bos: Bos  # where BOS stands in them
    num_available: int  # windows that the field would evaluate on
    num_tokens_available: int

    @property
    def is_partial(self) -> bool:
        """A limit left windows out."""
        return len(self.windows) < self.num_available

    @property
    def details(self) -> TextDetails:
        """What a `Measurement` says of them."""
        num_windows, seqlen = self.windows.shape
        return TextDetails(num_windows, num_windows * seqlen, self.num_tokens_available, seqlen, self.bos)


def read_windows(context: MetricContext) -> TextWindows:
    """The text as the field reads it: tokenized once, cut into windows, the tail dropped. BOS is one of T tokens.

    Raises:
        UsageError: Not one window is filled, or the tokenizer is that of another model.
        ResourceError: The hub is out of reach.
    """
    source, protocol, folder = context.source, context.protocol, context.original.source
    assert isinstance(source, TextSource)

    def progress(done: int, total: int) -> None:
        context.callbacks.check_stop()
        context.callbacks.report(done, total, "characters")

    tokenizer = load_tokenizer(folder.path, trusts_code=folder.trusts_code)
    framing = Framing.of(tokenizer, protocol.bos)
    for reason, count in source.skipped("evaluation").items():
        context.callbacks.warn(f"{source.name}: passed over {count:,} {reason}")
    tokens = evaluation_tokens(source.for_model(tokenizer, protocol.chat_template), framing.tokenizer, progress)
    require_vocabulary(tokens, context.model.vocab_size, context.model.source.name)
    size, most = framing.text_tokens(protocol.seqlen), protocol.max_tokens
    num_available = len(cut(tokens, size, None, source.max_windows))
    read = cut(tokens, size, None if most is None else most // protocol.seqlen * size, source.max_windows)
    return TextWindows(framing.framed(read), protocol.bos, num_available, tokens.numel())


@torch.no_grad()
def window_values(context: MetricContext, windows: Tensor, score: TokenScore) -> list[float]:
    """The score of each window: the mean over the tokens that follow another one in it.

    The activations of many windows pass through one block before the next is loaded, by way of one scratch stream, so
    the memory needed is that of pruning. Stopped, it resumes after the last group of windows.

    Args:
        context: The model, scratch space, device and callbacks.
        windows: Token ids (n, T).
        score: Scores predictions.
    """
    num_windows, seqlen = windows.shape
    group = min(max(_TOKENS_AT_ONCE // seqlen, 1), num_windows)
    shape = (seqlen, context.model.hidden_size)
    stream = context.scratch.stream("hidden", group, shape, context.device.torch_dtype)
    measuring = _Measuring(context, windows, stream, score)
    for start in range(len(measuring.values), num_windows, group):
        measuring.measure(range(start, min(start + group, num_windows)))
    return measuring.values


class _Windows:
    """Windows of text as `Samples`."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int, /) -> Tensor:
        return self._windows[index].clone()


class _Measuring:
    """The values of the windows that are done, and how the next ones are measured."""

    def __init__(self, context: MetricContext, windows: Tensor, stream: Stream, score: TokenScore) -> None:
        self.model, self.windows, self.stream, self.score = context.model, windows, stream, score
        self.choices, self.callbacks, self.device = context.device, context.callbacks, context.device.torch_device
        # A run may be evaluated on another text under the same name.
        self._text = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        self.values: list[float] = []
        restored = context.callbacks.restore()
        if restored is not None and restored.figures["text"] == self._text:
            self.values = restored.figures["losses"]
        self._passes = self.model.num_blocks + 2  # in, through each block, out
        self._done = len(self.values) * self._passes

    def measure(self, numbers: Sequence[int]) -> None:
        """Add the values of these windows, no more than the stream holds."""
        inputs = _Windows(self.windows[numbers[0] : numbers[-1] + 1])
        places = range(len(inputs))
        ends = self.model.load_ends(self.device, part="enter")
        batches = micro_batches(places, self.windows.shape[1], self.choices)
        with Reading(batches, (inputs,), self.device) as read, Writing(self.stream, self.device) as out:
            for group, (tokens,) in read:
                self._boundary()
                with computing(self.choices):
                    hidden = ends.enter(tokens).hidden
                out.write(group, hidden)
                self._advance(len(group))
        del ends
        for block_index in range(self.model.num_blocks):
            block = self.model.load_block(block_index, self.device)
            block_pass = BlockRunner(self.model, block, block_index, inputs, self.choices)
            block_pass.propagate(self.stream, self.stream, self._boundary, self._advance)
            del block, block_pass
        ends = self.model.load_ends(self.device, part="leave")
        values: list[float] = []
        with Reading([[place] for place in places], (inputs, self.stream), self.device) as read:
            for _, (window, hidden) in read:
                self._boundary()
                values.append(self._score(ends, window, hidden))
                self._advance(1, **{self.score.name: self.score.mean([*self.values, *values])})
        self.values = [*self.values, *values]

    def _score(self, ends: Ends, window: Tensor, hidden: Tensor) -> float:
        """The score of one window. window: token ids (1, T); hidden: the last block's output, (1, T, H)."""
        following = window[0, 1:]
        totals = []
        for part in token_slices(len(following), self.model.vocab_size):
            with computing(self.choices):
                logits = ends.leave(window[:, part], hidden[:, part])
            totals.append(self.score.total(logits[0], following[part]))
        return math.fsum(totals) / len(following)

    def _boundary(self) -> None:
        self.callbacks.checkpoint(lambda: Checkpoint(figures={"text": self._text, "losses": self.values}))

    def _advance(self, count: int = 1, **figures: float) -> None:
        self._done += count
        self.callbacks.report(self._done, len(self.windows) * self._passes, "windows", **figures)
