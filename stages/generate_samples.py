"""The stage in which the original model writes samples itself, to distill on beside real ones.

A few hundred samples of one text say little about how the model behaves on others. What the model writes on from short
prompts covers far more of them, and needs no data ("LLM-QAT", arXiv 2305.17888). A sample is laid out as one of the
given set: it is cut into pieces, each begins with the first tokens of that place, and the rest is drawn from the
model's next-token distribution (temperature 1, the end-of-text token left out).

N: samples that are written.    T: tokens of a sample.    P: pieces of all samples.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from stages.errors import NumericalError, UsageError
from stages.interfaces import Checkpoint, Samples, Stream
from stages.machine.device import computing
from stages.models.base import BlockModel, GeneratesText
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import Counter
from stages.runtime.sample_views import ChosenSamples
from stages.training.loss import split_samples
from stages.training.seeding import derive_seed

# Tokens of a piece at most, and how many of them are real. A piece is what the model keeps keys and values of.
_PIECE, _PROMPT = 256, 16
# Keys and values of the pieces that are written together take about this many bytes. How many there are changes bits:
# so it does not depend on the memory limit.
_CACHE_BYTES = 512 * 2**20
# With fewer pieces at once, reading the weights takes most of the time: then nothing is written by default.
_FEWEST_AT_ONCE = 16
# Tokens whose probabilities are added up before a token is drawn among those of one group.
_GROUP = 256
_FP32 = 4
# What transformers' code of a family raises where it has a fault. A RuntimeError, such as for want of memory, is none.
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


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


def cache_bytes(model: BlockModel, tokens: int) -> int:
    """About how many bytes the keys and values of a piece take. tokens: of a sample."""
    numbers = model.cache_numbers_per_token if isinstance(model, GeneratesText) else 0
    return min(tokens, _PIECE) * numbers * _FP32


def pieces_at_once(model: BlockModel, tokens: int) -> int:
    """How many pieces are written together; at least one. tokens: of a sample."""
    return max(_CACHE_BYTES // max(cache_bytes(model, tokens), 1), 1)


def can_generate(model: BlockModel) -> TypeGuard[GeneratesText]:
    """Whether the model can write text at all."""
    return isinstance(model, GeneratesText) and model.can_generate


def generates_by_default(model: BlockModel, tokens: int) -> bool:
    """Whether writing takes a time in proportion to that of a pass through the model. tokens: of a sample."""
    return can_generate(model) and pieces_at_once(model, tokens) >= _FEWEST_AT_ONCE


@torch.no_grad()
def generate_samples(context: StageContext, out: Stream, seed: int, *, holds_out: bool, is_resident: bool) -> int:
    """Write samples.

    Args:
        context: The original model, and samples of token ids (T,) whose beginnings are the prompts: the first for the
            first that is written, over again where there are fewer.
        out: Receives N samples of token ids, (T,).
        seed: Of the run.
        holds_out: The samples that training holds out (`stages.training.loss.split_samples`) are no prompts.
        is_resident: All blocks stay in memory; otherwise each is read for every token. Changes no bit of the result.

    Returns:
        How many of the N T tokens are those of the prompts.

    Raises:
        UsageError: The model cannot generate text.
        NumericalError: Its logits are NaN or infinite.
    """
    callbacks = context.callbacks
    given = ChosenSamples(context.inputs, split_samples(len(context.inputs), holds_out)[0])
    samples = torch.stack([given[index % len(given)] for index in range(len(out))])
    pieces = pieces_of(*samples.shape)
    num_chunks = math.ceil(len(pieces) / pieces_at_once(context.model, samples.shape[1]))
    ends = [k * len(pieces) // num_chunks for k in range(num_chunks + 1)]
    first = 0
    restored = callbacks.restore()
    if restored is not None:
        samples, first = restored.tensors["samples"], restored.figures["chunks"]
    bos, num_real = _common_first(context.inputs), _num_real(pieces)
    writer = _Writer(context, bos, num_real, is_resident=is_resident)
    if not is_resident and first < num_chunks:
        reads = num_chunks * (max(piece.length for piece in pieces) - num_real)
        callbacks.warn(
            "the blocks of the original do not fit into memory together: to generate "
            f"{len(out)} samples, each is read {reads} times"
        )
    for chunk in range(first, num_chunks):
        seed_of_chunk = derive_seed(seed, "generate", chunk)
        written = writer.write(samples, pieces[ends[chunk] : ends[chunk + 1]], seed_of_chunk, (chunk, num_chunks))
        for piece, tokens in written:
            samples[piece.sample, piece.start : piece.start + piece.length] = tokens
        # A chunk takes long, and its tokens take little room.
        callbacks.checkpoint_now(functools.partial(Checkpoint, {"samples": samples}, {"chunks": chunk + 1}))
    for index, sample in enumerate(samples):
        out.write(index, sample)
    return sum(num_real + (bos is not None and piece.start == 0) for piece in pieces)


def _common_first(samples: Samples) -> int | None:
    """The token that every sample begins with, which is BOS; None: there is none."""
    first = {int(samples[index][0]) for index in range(len(samples))}
    return first.pop() if len(first) == 1 and len(samples) > 1 else None


def _num_real(pieces: Sequence[Piece]) -> int:
    """How many tokens of the prompt's sample each of these pieces begins with, beside BOS."""
    return min(_PROMPT, max(min(piece.length for piece in pieces) // 4, 1))


class _Writer:
    """The original model, with its own loop over the tokens (`transformers.GenerationMixin.generate`)."""

    def __init__(self, context: StageContext, bos: int | None, num_real: int, *, is_resident: bool) -> None:
        """Prepare the model.

        Args:
            context: The model.
            bos: The token that a text begins with; None: there is none.
            num_real: Tokens of a prompt, beside BOS.
            is_resident: All blocks stay in memory.
        """
        model, device = context.model, context.device.torch_device
        if not can_generate(model):
            raise UsageError(f"{model.source.name} writes no text: leave out --distill-generated")
        self._context, self._bos, self._num_real, self._is_resident = context, bos, num_real, is_resident
        self._blocks: dict[int, nn.Module] = {}
        self._model = model.generation_model(device, self._block)
        # What the original's settings say of writing is another distribution: penalties, words that are left out.
        self._model.generation_config = GenerationConfig()

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
        prompts = torch.stack([self._prompt(samples[piece.sample], piece) for piece in pieces]).to(device)
        longest = max(piece.length for piece in pieces)
        num_new = longest - self._num_real
        end = model.config.get_text_config().eos_token_id
        settings = GenerationConfig(
            do_sample=False,  # _Drawing leaves one token to choose
            min_new_tokens=num_new,  # the end of the text is left out of the distribution
            max_new_tokens=num_new,
            use_cache=True,
            eos_token_id=None if end == [] else end,
            pad_token_id=0,  # nothing is padded
        )
        number, count = chunk
        counter = Counter(context.callbacks, count * num_new, "tokens of each sample", done=number * num_new)
        watching = StoppingCriteriaList([_Watching(context.callbacks.check_stop, counter)])
        drawing = _Drawing(context.model.source.name, torch.Generator().manual_seed(seed))
        with computing(context.device):
            try:
                written = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([drawing]),
                    stopping_criteria=watching,
                ).cpu()
            except _FAULTS as error:
                if _is_ours(error):
                    raise
                raise UsageError(
                    f"{context.model.source.name} fails to write text ({type(error).__name__}: {error}): do without, "
                    "by --distill-generated 0"
                ) from error
        for piece, tokens in zip(pieces, written, strict=True):
            skipped = int(self._bos is not None and piece.start > 0)
            yield piece, tokens[skipped : skipped + piece.length]

    def _prompt(self, sample: Tensor, piece: Piece) -> Tensor:
        """BOS, if there is one, and the first tokens of the piece."""
        num_real = self._num_real
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


def _is_ours(error: Exception) -> bool:
    """Whether it was raised in this package, or by what this package called itself in PyTorch."""
    modules = (str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__))
    *_, innermost = (module for module in modules if module.partition(".")[0] != "torch")
    return innermost.partition(".")[0] == __name__.partition(".")[0]


class _Drawing(LogitsProcessor):
    """Draws the next token of every text, and leaves out all others. -inf is a token that is left out before."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        self._name, self._generator = name, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = drawn(scores, self._generator)
        if tokens is None:
            raise NumericalError(
                f"{self._name} gives logits that are NaN or infinite: its weights or activations hold NaN or infinity"
            )
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)


def drawn(scores: Tensor, generator: torch.Generator) -> Tensor | None:
    """Draw a token for each row from the distribution of its logits, by one uniform number and running sums.

    The sum of every group of tokens finds the group, and a running sum within it the token. That takes 7 ms on one core
    for 43 rows of 49,152 logits, and torch.multinomial, with an exponential number for every token, 53 ms.

    Args:
        scores: Logits (rows, V) in fp32. -inf: left out.
        generator: On the CPU.

    Returns:
        Tokens (rows,), on the device of the logits; None: some are NaN or +inf.
    """
    probabilities = scores.softmax(-1)
    groups = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % _GROUP)).unflatten(1, (-1, _GROUP))
    sums = groups.sum(-1).cpu().double()
    if not bool(torch.isfinite(sums).all()):
        return None
    share, group = _place(sums, torch.rand(len(sums), dtype=torch.float64, generator=generator))
    rows = torch.arange(len(sums), device=scores.device)
    _, token = _place(groups[rows, group.to(scores.device)].cpu().double(), share)
    return (group * _GROUP + token).to(scores.device)


def _place(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where a share of the sum of each row lies.

    Args:
        weights: (rows, n), not negative, fp64.
        share: (rows,), from 0 to below 1.

    Returns:
        What share of the place's own weight lies before it, and which place it is: one whose weight is not 0.
    """
    upto = weights.cumsum(1)
    wanted = (share * upto[:, -1])[:, None]
    last = (
        (weights > 0).long().cumsum(1).argmax(1, keepdim=True)
    )  # the last that is not 0: for what rounding puts behind
    place = torch.minimum(torch.searchsorted(upto, wanted, right=True), last)
    weight = weights.gather(1, place)
    before = upto.gather(1, place) - weight
    return ((wanted - before) / weight).clamp(0, 1 - 1e-12)[:, 0], place[:, 0]


class _Watching(StoppingCriteria):
    """Looks after each token whether to stop, and reports it; ends nothing itself."""

    def __init__(self, check_stop: Callable[[], None], counter: Counter) -> None:
        self._check_stop, self._counter = check_stop, counter

    def __call__(self, input_ids: Tensor, scores: Tensor, **_kwargs: object) -> Tensor:
        self._check_stop()
        self._counter.advance()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
