"""Algorithm 1 of LAMP, in memory: the reference for every run, and the core of the Python API.

    1  z^0  = embeddings of the calibration set             both streams begin with the same hidden states
    2  z'^1 = B^1(z^0)                                      the dense stream: through the original blocks
    3  for i = 1 .. n-1:
    4      B^i      <- prune(B^i; z^(i-1))                  statistics from the biased stream
    5      z^i       = B^i(z^(i-1))                         the biased stream: through the pruned blocks
    6      the window slides on to block i+1, still dense
    7      z'^(i+1)  = B^(i+1)(z'^i)                        by the ORIGINAL block i+1
    8      B^(i+1)  <- argmin |B^(i+1)(z^i) - z'^(i+1)|^2   over all parameters of the dense block (Eq. 9)
    9  B^n <- prune(B^n)

The paper counts blocks from 1, the code from 0. Refinement (train the weights that a pruned block kept, its pruning
mask fixed) is not in the paper. `lampctl run` takes the same steps over streams on disk, committed one by one
(`pipeline.steps`), and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.export import block_dtypes
from stages.finish_block import FinishedBlock
from stages.in_memory import ListStream
from stages.interfaces import Samples
from stages.prune_block import prune_block
from stages.pruners.base import Pruner
from stages.refine_block import refine_block
from stages.runtime.block_context import BlockOutput, StageContext
from stages.sparsity.budget import BlockBudget
from stages.sparsity.outcome import PruneOutcome
from stages.training.trainer import Training, TrainingSettings

# How many weights each layer loses: known beforehand, or found from the input of block 0.
Budget = Sequence[BlockBudget] | Callable[[Samples], Sequence[BlockBudget]]


@dataclass(frozen=True)
class LampSettings:
    """How blocks are pruned and trained."""

    pruner: Pruner
    compensation: TrainingSettings | None = None  # None: the pruner alone, without lines 6-8
    refinement: TrainingSettings | None = None  # None: as the paper; else with compensation only
    export_dtype: str = "original"  # "original", "float32", "bfloat16", "float16"


@dataclass(frozen=True)
class LampBlock:
    """A finished block, and how it came about."""

    index: int
    finished: FinishedBlock  # the state in the export dtype, and each layer's counts
    outcome: PruneOutcome  # pruning masks and quantization grids
    compensation: Training | None
    refinement: Training | None


def lamp(context: StageContext, budget: Budget, settings: LampSettings) -> Iterator[LampBlock]:
    """Prune a model block by block, and give each block as soon as it is finished.

    Args:
        context: The model and its N samples; no samples for a pruner that reads no data.
        budget: How many weights each layer loses; a model's blocks beyond it are left as they are.
        settings: The pruner, compensation and refinement.

    Raises:
        NumericalError: A weight or a loss is not finite, or a Hessian has no usable factor.
    """
    trains, reads_data = settings.compensation is not None, settings.pruner.needs_data
    biased = dense = None
    if reads_data:
        biased, dense = _stream(context), _stream(context) if trains else None
        capture(context, biased, dense)  # lines 1-2
    blocks = budget(_given(biased)) if callable(budget) else budget

    for i, block_budget in enumerate(blocks):  # line 3
        block, is_last = context.block(i), i == len(blocks) - 1
        state, target, compensation, refinement = None, dense, None, None

        if i > 0 and settings.compensation is not None:  # line 6
            target = _stream(context)
            compensated = compensate_block(block, _given(biased), _given(dense), target, settings.compensation)  # 7-8
            state, compensation = compensated.state, compensated.training

        stream = _stream(context) if reads_data and not is_last else None
        output = BlockOutput(block_dtypes(context.model, i, settings.export_dtype), stream)
        if settings.refinement is None:
            pruned = prune_block(block, settings.pruner, block_budget, biased, state=state, output=output)  # 4-5, 9
            finished = pruned.finished
        else:
            pruned = prune_block(block, settings.pruner, block_budget, biased, state=state, output=None)
            refined = refine_block(block, pruned, _given(biased), _given(target), settings.refinement, output)
            finished, refinement = refined.finished, refined.training
        assert finished is not None
        yield LampBlock(i, finished, pruned.outcome, compensation, refinement)
        biased, dense = stream, target


def _stream(context: StageContext) -> ListStream:
    """Room for N samples of hidden states."""
    return ListStream(len(context.inputs), context.hidden_shape, context.device.torch_dtype)


def _given(stream: ListStream | None) -> ListStream:
    assert stream is not None, "this pruner reads no data, and so nothing can be trained"
    return stream
