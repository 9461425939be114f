"""The stage in which the original model writes samples itself, to distill on beside real ones.

A few hundred samples of one text say little about how the model behaves on others. What the model writes on from short
prompts covers far more of them, and needs no data ("LLM-QAT", arXiv 2305.17888). A sample is laid out as one of the
given set: it is cut into pieces, each begins with the first tokens of that place, and the rest is drawn from the
model's next-token distribution (temperature 1, the end-of-text token left out).

N: samples that are written.    T: tokens of a sample.    P: pieces of all samples.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from stages.errors import UsageError
from stages.interfaces import Checkpoint, Samples, Stream
from stages.machine.device import computing
from stages.models.base import BlockModel, WritesText
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import Counter
from stages.training.seeding import derive_seed

# Tokens of a piece at most, and how many of them are real. A piece is what the model keeps keys and values of.
_PIECE, _PROMPT = 256, 16
# Keys and values of the pieces that are written together take about this many bytes. How many there are changes bits:
# so it does not depend on the memory limit.
_CACHE_BYTES = 256 * 2**20
# With fewer pieces at once, reading the weights takes most of the time: then nothing is written by default.
_FEWEST_AT_ONCE = 8
_FP32 = 4
# What the code of a family raises where it has a fault. A RuntimeError, such as for want of memory, is none.
_OF_THE_LIBRARY = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True)
class Piece:
    """A part of a sample that is written by itself: where it begins in the sample, and how many tokens it has."""

    sample: int
    start: int
    length: int


def pieces_of(num_samples: int, tokens: int) -> list[Piece]:
    """The pieces of N samples of T tokens, as even as they can be."""
    count = math.ceil(tokens / _PIECE)
    starts = [k * tokens // count for k in range(count + 1)]
    return [
        Piece(sample, start, end - start) for sample in range(num_samples) for start, end in itertools.pairwise(starts)
    ]


def num_real_tokens(samples: Samples, num_samples: int) -> int:
    """How many of the tokens of `num_samples` written samples are those of the given ones."""
    pieces, bos = pieces_of(num_samples, len(samples[0])), _common_first(samples)
    return sum(_num_real(pieces) + (bos is not None and piece.start == 0) for piece in pieces)


def cache_bytes(model: BlockModel, tokens: int) -> int:
    """About how many bytes the keys and values of a piece take. tokens: of a sample."""
    numbers = model.cache_numbers_per_token if isinstance(model, WritesText) else 0
    return min(tokens, _PIECE) * numbers * _FP32


def pieces_at_once(model: BlockModel, tokens: int) -> int:
    """How many pieces are written together; at least one. tokens: of a sample."""
    return max(_CACHE_BYTES // max(cache_bytes(model, tokens), 1), 1)


def can_write(model: BlockModel) -> TypeGuard[WritesText]:
    """Whether the model can write text at all."""
    return isinstance(model, WritesText) and model.can_write


def writes_by_default(model: BlockModel, tokens: int) -> bool:
    """Whether writing takes a time in proportion to that of a pass through the model. tokens: of a sample."""
    return can_write(model) and pieces_at_once(model, tokens) >= _FEWEST_AT_ONCE


@torch.no_grad()
def generate_samples(context: StageContext, out: Stream, seed: int, *, is_resident: bool) -> None:
    """Write samples.

    Args:
        context: The original model, and the samples whose beginnings are the prompts, token ids (T,): the first for the
            first that is written, over again where there are fewer.
        out: Receives N samples of token ids, (T,).
        seed: Of the run.
        is_resident: All blocks stay in memory; otherwise each is read for every token. Changes no bit of the result.

    Raises:
        UsageError: The model cannot write text.
    """
    given, callbacks = context.inputs, context.callbacks
    samples = torch.stack([given[index % len(given)] for index in range(len(out))])
    pieces = pieces_of(*samples.shape)
    num_chunks = math.ceil(len(pieces) / pieces_at_once(context.model, samples.shape[1]))
    ends = [k * len(pieces) // num_chunks for k in range(num_chunks + 1)]
    first = 0
    restored = callbacks.restore()
    if restored is not None:
        samples, first = restored.tensors["samples"], restored.figures["chunks"]
    writer = _Writer(context, _common_first(given), is_resident=is_resident)
    for chunk in range(first, num_chunks):
        seed_of_chunk = derive_seed(seed, "generate", chunk)
        written = writer.write(samples, pieces[ends[chunk] : ends[chunk + 1]], seed_of_chunk, (chunk, num_chunks))
        for piece, tokens in written:
            samples[piece.sample, piece.start : piece.start + piece.length] = tokens
        state = Checkpoint({"samples": samples.clone()}, {"chunks": chunk + 1})
        callbacks.checkpoint(lambda state=state: state)  # type: ignore[misc]
    for index, sample in enumerate(samples):
        out.write(index, sample)


def _common_first(samples: Samples) -> int | None:
    """The token that every sample begins with, which is BOS; None: there is none."""
    first = {int(samples[index][0]) for index in range(len(samples))}
    return first.pop() if len(first) == 1 and len(samples) > 1 else None


def _num_real(pieces: Sequence[Piece]) -> int:
    """How many real tokens each of the pieces begins with, beside BOS."""
    return min(_PROMPT, max(min(piece.length for piece in pieces) // 4, 1))


class _Writer:
    """The original model, with its own loop over the tokens (`transformers.GenerationMixin.generate`)."""

    def __init__(self, context: StageContext, bos: int | None, *, is_resident: bool) -> None:
        """Prepare the model. bos: the token that a text begins with; None: there is none."""
        model, device = context.model, context.device.torch_device
        if not can_write(model):
            raise UsageError(f"{model.source.name} writes no text: leave out --distill-generated")
        self._context, self._bos, self._is_resident = context, bos, is_resident
        self._blocks: dict[int, nn.Module] = {}
        self._model = model.writer(device, self._block)

    def write(
        self, samples: Tensor, pieces: Sequence[Piece], seed: int, chunk: tuple[int, int]
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Write pieces of equal prompts together.

        Args:
            samples: (N, T); their beginnings at the pieces' places are the prompts.
            pieces: Which.
            seed: Of the random numbers.
            chunk: Which call this is, of how many.

        Yields:
            Each piece, and its tokens.
        """
        context, model = self._context, self._model
        device = context.device.torch_device
        num_real = _num_real(pieces)
        prompts = torch.stack([self._prompt(samples[piece.sample], piece, num_real) for piece in pieces]).to(device)
        longest = max(piece.length for piece in pieces)
        most = longest - num_real
        end = model.config.get_text_config().eos_token_id
        how = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=most,  # the end of the text is left out of the distribution
            max_new_tokens=most,
            eos_token_id=end,
            pad_token_id=end[0] if isinstance(end, list) else end or 0,
        )
        number, count = chunk
        counter = Counter(context.callbacks, count * most, "tokens of each sample", done=number * most)
        watching = StoppingCriteriaList([_Watching(context.callbacks.check_stop, counter)])
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), computing(context.device):
            torch.manual_seed(seed)
            try:
                written = model.generate(
                    prompts, attention_mask=torch.ones_like(prompts), generation_config=how, stopping_criteria=watching
                ).cpu()
            except _OF_THE_LIBRARY as error:
                raise UsageError(
                    f"{context.model.source.name} fails to write text ({type(error).__name__}: {error}): do without, "
                    "by --distill-generated 0"
                ) from error
        for piece, tokens in zip(pieces, written, strict=True):
            skipped = int(self._bos is not None and piece.start > 0)
            yield piece, tokens[skipped : skipped + piece.length]

    def _prompt(self, sample: Tensor, piece: Piece, num_real: int) -> Tensor:
        """BOS, if there is one, and `num_real` tokens of the sample."""
        if self._bos is None:
            return sample[piece.start : piece.start + num_real]
        if piece.start == 0:
            return sample[: num_real + 1]
        return torch.cat([torch.tensor([self._bos]), sample[piece.start : piece.start + num_real]])

    @contextlib.contextmanager
    def _block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights. Without them it stays: RecurrentGemma's have the state of the text in them."""
        is_new = index not in self._blocks
        if is_new:
            self._blocks[index] = self._context.block(index).load()
        block = self._blocks[index]
        if self._is_resident:
            yield block
            return
        if not is_new:
            block.load_state_dict(self._context.block(index).load().state_dict(), assign=True)
        yield block
        block.load_state_dict({name: tensor.to("meta") for name, tensor in block.state_dict().items()}, assign=True)


class _Watching(StoppingCriteria):
    """Looks after each token whether to stop, and reports it; ends nothing itself."""

    def __init__(self, check_stop: Callable[[], None], counter: Counter) -> None:
        self._check_stop, self._counter = check_stop, counter

    def __call__(self, input_ids: Tensor, scores: Tensor, **_kwargs: object) -> Tensor:
        self._check_stop()
        self._counter.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
