"""Estimate the peak memory of each kind of step from a model's shapes, before anything is loaded.

An estimate is the sum of the tensors that the code holds at once and of the activations, counted layer by layer. A step
that exceeds the limit warns with its measured peak (`pipeline/steps/executor.py`).

P: parameters of a block.    C, R: input and output width of a layer.    T: tokens of a sample.    H: hidden size.
V: vocabulary.    All arithmetic is fp32, 4 bytes per number; bf16 takes no more.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stages.errors import ResourceError
from stages.models.base import BlockModel, LayerInfo
from stages.pruners.base import Pruner
from stages.pruners.registry import PAPER_PRUNER, PRUNERS

_FP32 = 4
# Layers with these roles read the same input and share one set of statistics.
_SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
# Bytes that the export gathers before it writes (`stages.export`).
_EXPORTED_AT_ONCE = 256_000_000
# Bytes of the logits of the student and the teacher, and of the loss between them (`stages.training.end_loss`).
_LOGITS = 6 * _FP32 * 2**24
# Allocators keep some freed memory, and small tensors are not counted.
_SLACK = 1.05
_NOISE = 1.15  # baseline memory differs between processes
# Advice that saves a smaller share of what a run takes is left out.
_WORTH_NAMING = 0.05


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model and its calibration set that decide the memory of a run."""

    block: int  # P, of the block; of a model, of the largest one
    layers: tuple[LayerInfo, ...]  # of that block
    hidden: int  # H
    vocabulary: int  # V
    tokens: int  # T
    itemsize: int  # bytes of one number of a stored activation
    attention: int = 0  # numbers that a block's attention materializes for one sample
    all_blocks: int = 0  # parameters of all blocks
    num_blocks: int = 0

    @classmethod
    def of(cls, model: BlockModel, tokens: int, itemsize: int, block_index: int | None = None) -> Shapes:
        """The shapes of `model` with samples of `tokens` tokens. block_index: the block; None: the largest one."""
        sizes = [sum(model.entry_sizes(index).values()) for index in range(model.num_blocks)]
        chosen = range(model.num_blocks) if block_index is None else (block_index,)
        size, index = max((sizes[index], -index) for index in chosen)
        return cls(
            size,
            model.layers(-index),
            model.hidden_size,
            model.vocab_size,
            tokens,
            itemsize,
            model.attention_numbers,
            sum(sizes),
            model.num_blocks,
        )

    @property
    def inputs(self) -> dict[str, list[LayerInfo]]:
        """The layers, grouped by the input that they read."""
        groups: dict[str, list[LayerInfo]] = {}
        for layer in self.layers:
            shared = _SHARED.get(layer.role or "", layer.path)
            expert = f"{layer.path.rpartition('.')[0]}." if layer.peers is not None else ""
            groups.setdefault(expert + shared, []).append(layer)
        return groups

    def chunks(self, num_streams: int, samples: int) -> int:
        """Bytes of two micro-batches of `samples` samples of each of `num_streams` streams."""
        return 2 * num_streams * samples * self.tokens * self.hidden * self.itemsize

    def passing(self, samples: int) -> int:
        """Bytes of a forward pass without gradients: one layer's input and output, and the residual stream."""
        widest = max((layer.rows + layer.cols for layer in self.layers), default=0)
        # Gated and attention layers hold two outputs at once.
        return _FP32 * samples * (self.tokens * (2 * widest + 4 * self.hidden) + self.attention)

    def remembered(self) -> int:
        """Bytes of the activations that a forward pass over one sample keeps for its gradient."""
        distinct = sum(math.ceil(group[0].token_share * group[0].cols) for group in self.inputs.values())
        outputs = sum(math.ceil(layer.token_share * layer.rows) for layer in self.layers)
        linear = 2 * distinct + 2 * outputs + 6 * self.hidden
        return _FP32 * (self.tokens * linear + 2 * self.attention)


@dataclass(frozen=True)
class Work:
    """The parts of a run's configuration that decide its memory."""

    pruner: type[Pruner]
    trains: bool  # compensates or refines
    is_quantized: bool
    eval_tokens: int  # of one evaluation window; 0: nothing is evaluated
    distills: bool = False
    kept: float = 1.0  # share of the weights that are not masked
    num_heads: int = 0  # in memory at once while the end loss is measured; 0: it is not
    num_at_once: int = 0  # texts that the original model generates at once; 0: none
    cache_bytes: int = 0  # bytes of the keys and values of one of them


@dataclass(frozen=True)
class Fit:
    """The choices that keep a run within a memory limit, and its peak memory with them."""

    samples_at_once: int  # in a forward pass without gradients
    spills: bool  # the best weights so far are stored on disk while a block is trained
    distills_resident: bool  # all blocks are in memory while the model is distilled
    generates_resident: bool  # all blocks are in memory while the original model generates samples
    peak_bytes: int
    left_bytes: int  # what the run may take beside the baseline memory
    shortage: str | None = None  # the machine may have too little memory: what is needed and what there is


@dataclass(frozen=True)
class Room:
    """The memory that a run may take, the baseline memory of the process included."""

    available_bytes: int  # what this machine has for it
    limit_bytes: int | None = None  # that the user has set; None: what is available
    is_device: bool = False  # memory of a GPU, which is not lent out: what does not fit there fails

    @property
    def bound(self) -> int:
        """The most bytes that the run shall take."""
        return self.available_bytes if self.limit_bytes is None else self.limit_bytes

    @property
    def where(self) -> str:
        """The kind of memory, for messages."""
        return "GPU memory" if self.is_device else "memory"


def peaks(shapes: Shapes, work: Work, samples: int, *, spills: bool, room_bytes: int | None = None) -> dict[str, int]:
    """Peak bytes of each kind of step, without the baseline memory of the process.

    room_bytes: What the statistics of a block may take at once; None: one pass collects all of them.
    """
    block, passing = _FP32 * shapes.block, shapes.passing(samples)
    ends = _FP32 * shapes.vocabulary * shapes.hidden
    found = {"capture": ends + block * work.trains + passing + shapes.chunks(3, samples)}
    found["prune-block"] = block + _pruning(shapes, work, room_bytes) + passing + shapes.chunks(2, samples)
    if work.trains:
        copies = 3 if spills else 4  # weights, two moments, the best so far
        # The straight-through estimator computes with a rounded copy of the weights and keeps it for the gradient.
        copies += work.is_quantized
        # The backward pass frees activations while it allocates gradients.
        low, high = sorted((block, shapes.remembered()))
        backward = max(high + low // 2, passing)
        masks = shapes.block
        found["training"] = copies * block + masks + backward + shapes.chunks(2, samples)
    if work.distills:
        found["distill"] = distillation(shapes, work, is_resident=False)
    if work.num_at_once:
        found["generate"] = generation(shapes, work, is_resident=False)
    found["export"] = ends + min(_EXPORTED_AT_ONCE, 2 * ends)
    if work.eval_tokens:
        logits = 3 * _FP32 * work.eval_tokens * shapes.vocabulary
        found["evaluate"] = max(2 * ends + logits, ends + passing, block + passing) + shapes.chunks(2, samples)
    if work.num_heads:
        head = work.num_heads * ends + min(_LOGITS, 4 * _FP32 * shapes.tokens * shapes.vocabulary)
        found["end-loss"] = max(head, ends + passing, block + passing) + shapes.chunks(2, samples)
    return {kind: int(size * _SLACK) for kind, size in found.items()}


def distillation(shapes: Shapes, work: Work, *, is_resident: bool) -> int:
    """Bytes of a distillation step. is_resident: all blocks are in memory; otherwise one."""
    ends = _FP32 * shapes.vocabulary * shapes.hidden
    num_blocks, weights = (shapes.num_blocks, shapes.all_blocks) if is_resident else (1, shapes.block)
    # Weights and gradients, two moments of the kept weights, two masks of one byte; a step of Adam copies the kept
    # weights of one block, and their gradients.
    lasting = _FP32 * int((2 + 2 * work.kept) * weights) + 2 * weights
    if work.is_quantized:
        lasting += _FP32 * weights  # the rounded copy that the straight-through estimator computes with
    backward = max(num_blocks * shapes.remembered(), _FP32 * int(2 * work.kept * shapes.block))
    head = ends + min(_LOGITS, 4 * _FP32 * shapes.tokens * shapes.vocabulary)
    chunks = shapes.chunks(2, 1)
    return lasting + backward + head + chunks if is_resident else max(lasting + backward, head) + chunks


def generation(shapes: Shapes, work: Work, *, is_resident: bool) -> int:
    """Bytes of a step in which the original model generates samples. is_resident: all blocks are in memory, or one."""
    outside = 2 * _FP32 * shapes.vocabulary * shapes.hidden  # embeddings and head
    logits = 4 * _FP32 * work.num_at_once * shapes.vocabulary  # their softmax, and what is drawn from it
    weights = _FP32 * (shapes.all_blocks if is_resident else shapes.block)
    return outside + logits + weights + work.num_at_once * work.cache_bytes


def least_room(shapes: Shapes, work: Work) -> int:
    """Bytes that the statistics of a block take at once, if each pass collects those of one input."""
    places = Counter(group[0].peers for group in shapes.inputs.values())
    # An expert may need the sum of its peers, which is in memory between their passes.
    return max(
        (
            (2 if group[0].peers is not None and places[group[0].peers] > 1 else 1) * _sums(group, work)
            for group in shapes.inputs.values()
        ),
        default=0,
    )


def _least_peaks(shapes: Shapes, work: Work, samples: int, *, spills: bool) -> dict[str, int]:
    """`peaks`, with as many passes over the samples as keep the peak of pruning low."""
    one_pass = peaks(shapes, work, samples, spills=spills)
    passes = peaks(shapes, work, samples, spills=spills, room_bytes=least_room(shapes, work))
    return min(one_pass, passes, key=lambda found: found["prune-block"])


def statistics_room(shapes: Shapes, work: Work, samples: int, left_bytes: int | None) -> int | None:
    """How many bytes the statistics of a block may take at once (`stages.runtime.statistics_passes`).

    Args:
        shapes: Of the block.
        work: What the run does.
        samples: In a forward pass.
        left_bytes: What the memory limit leaves beside the baseline memory; None: no limit.

    Returns:
        None: all of them fit.
    """
    if left_bytes is None or peaks(shapes, work, samples, spills=True)["prune-block"] <= left_bytes:
        return None
    others = _FP32 * shapes.block + shapes.passing(samples) + shapes.chunks(2, samples)
    return max(0, int(left_bytes / _SLACK) - others - _beside_statistics(shapes, work))


def _pruning(shapes: Shapes, work: Work, room_bytes: int | None) -> int:
    """Bytes of the statistics of a block, of its masks, and of solving a layer.

    room_bytes: What the statistics take at most; None: all of them are collected at once, and each is freed when its
        layers are pruned.
    """
    if room_bytes is not None:
        return room_bytes + _beside_statistics(shapes, work)
    groups = shapes.inputs.values()
    rest = sum(_sums(group, work) for group in groups)
    masked, most = 0, rest + _pooled(shapes, work)
    for group in groups:
        masked += sum(layer.rows * layer.cols for layer in group)
        most = max(most, rest + masked + _solving(group, work))
        rest -= _sums(group, work)
    return most


def _beside_statistics(shapes: Shapes, work: Work) -> int:
    """Bytes that pruning in several passes takes beside statistics: masks, a byte for each weight, and a layer."""
    return shapes.block + max([_pooled(shapes, work), *(_solving(group, work) for group in shapes.inputs.values())])


def _pooled(shapes: Shapes, work: Work) -> int:
    """Bytes of the sum of the statistics of all experts at a place."""
    return max((_sums(group, work) for group in shapes.inputs.values() if group[0].peers is not None), default=0)


def _sums(group: Sequence[LayerInfo], work: Work) -> int:
    """Bytes of the statistics of an input, which the layers of `group` read."""
    kind = work.pruner.statistics()
    return _FP32 * kind.num_numbers(group[0].cols) if kind is not None else 0


def _solving(group: Sequence[LayerInfo], work: Work) -> int:
    """Bytes of solving a layer of `group`, beside its statistics."""
    size = max(layer.rows * layer.cols for layer in group)
    matrices = work.pruner.num_matrices(is_shared=len(group) > 1)
    return _FP32 * (matrices * group[0].cols ** 2 + work.pruner.num_weight_copies * size)


def fit(shapes: Shapes, work: Work, base_bytes: int, room: Room, candidates: Sequence[int]) -> Fit:
    """Choose the largest micro-batch that keeps the run within the memory that there is.

    The best weights are spilled to disk only if no micro-batch fits otherwise. The number of passes that collect the
    statistics of a block follows from the limit afterwards (`statistics_room`): it changes no result, and the
    micro-batch does. So a processor whose memory happens to be short takes the largest micro-batch all the same, unless
    the user has set a limit; what more the system has to lend is not known, and the run is not refused.

    Args:
        shapes: Sizes of the model and its samples.
        work: What the run does.
        base_bytes: Baseline memory before the model is loaded.
        room: The memory for it. All blocks are in memory together only where that is enough.
        candidates: Sizes of micro-batches, in samples, in rising order.

    Raises:
        ResourceError: Nothing fits; the message names the smallest sufficient limit.
    """
    left = room.bound - base_bytes
    is_hard = room.limit_bytes is not None or room.is_device
    choices = tuple(reversed(candidates)) if is_hard else tuple(candidates[-1:])
    for spills, samples in itertools.product((False, True), choices):
        if max(_least_peaks(shapes, work, samples, spills=spills).values()) <= left:
            return _fit(shapes, work, base_bytes, room, samples, spills=spills)
    details = _least_peaks(shapes, work, choices[-1], spills=True)
    smallest = _gb(_round_up(int(_NOISE * base_bytes) + max(details.values())))
    needs = f"{smallest} of {room.where} ({_describe(details, base_bytes)})"
    advice = _advice(shapes, work, choices[-1])
    if room.limit_bytes is not None:
        raise ResourceError(
            f"--memory-limit {_gb(room.limit_bytes)} is too little: this run needs {needs}. Give it that much, or "
            f"{advice}"
        )
    if room.is_device:
        raise ResourceError(f"this run needs {needs}, and {_gb(room.bound)} are free: {advice}, or use a larger GPU")
    shortage = (
        f"this run may need {needs}, and {_gb(room.bound)} are free here: the system may end it. Free some, or {advice}"
    )
    return replace(_fit(shapes, work, base_bytes, room, choices[-1], spills=True), shortage=shortage)


def _fit(shapes: Shapes, work: Work, base_bytes: int, room: Room, samples: int, *, spills: bool) -> Fit:
    """The choices with a micro-batch of `samples`."""
    left = room.bound - base_bytes
    statistics = statistics_room(shapes, work, samples, left)
    most = base_bytes + max(peaks(shapes, work, samples, spills=spills, room_bytes=statistics).values())
    there_is = min(room.available_bytes, room.bound)
    distilling, generating = (
        base_bytes + int(_SLACK * step(shapes, work, is_resident=True)) if is_wanted else None
        for step, is_wanted in ((distillation, work.distills), (generation, work.num_at_once > 0))
    )
    resident = [peak if peak is not None and peak <= there_is else 0 for peak in (distilling, generating)]
    return Fit(samples, spills, resident[0] > 0, resident[1] > 0, max(most, *resident), left)


def _advice(shapes: Shapes, work: Work, samples: int) -> str:
    """What takes less memory."""
    lighter = PRUNERS.get(PAPER_PRUNER)
    taken, less = (
        max(_least_peaks(shapes, each, samples, spills=True).values()) for each in (work, replace(work, pruner=lighter))
    )
    shorter = "use a smaller --seqlen"
    if taken - less < _WORTH_NAMING * taken:
        return shorter
    return f"prune with {lighter.title}, which takes {_gb(taken - less)} less, or {shorter}"


def _describe(details: Mapping[str, int], base_bytes: int) -> str:
    parts = [f"{kind} {_gb(base_bytes + size)}" for kind, size in sorted(details.items(), key=lambda x: -x[1])]
    return ", ".join(parts)


def _round_up(size: int) -> int:
    step = 10_000_000
    return -(-size // step) * step


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}GB"
