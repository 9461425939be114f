"""Algorithm 1 of LAMP, in memory: the reference for every run, and the core of the Python API.

    1  z^0  = embeddings of the calibration set             both streams begin with the same hidden states
    2  z'^1 = B^1(z^0)                                      the dense stream: through the original blocks
    3  for i = 1 .. n-1:
    4      B^i      <- prune(B^i; z^(i-1))                  statistics from the biased stream
    5      z^i       = B^i(z^(i-1))                         the biased stream: through the pruned blocks
    6      move on to block i+1, which is still dense
    7      z'^(i+1)  = B^(i+1)(z'^i)                        by the ORIGINAL block i+1
    8      B^(i+1)  <- argmin |B^(i+1)(z^i) - z'^(i+1)|^2   over all parameters of the dense block (Eq. 9)
    9  B^n <- prune(B^n)

The paper counts blocks from 1, the code from 0. The loop of `lamp` is rotated against the paper's: its iteration for a
block compensates this block, which ends the paper's iteration for the block before (lines 6-8), and then prunes it
(lines 4-5; of the last block: line 9). The operations and their order are the same; line 6 needs none.

Refinement is not in the paper: it trains the kept weights of a pruned block with its pruning mask fixed. `lampctl run`
takes the same steps over streams on disk, commits each of them (`pipeline.steps`), and gives bit-identical weights.

N: samples.    T: tokens of a sample.    H: hidden size.
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

# How many weights of each layer are pruned: counts, or a function that computes them from the input of block 0.
Budget = Sequence[BlockBudget] | Callable[[Samples], Sequence[BlockBudget]]


@dataclass(frozen=True)
class LampSettings:
    """How blocks are pruned and trained.

    Raises:
        ValueError: Refinement without compensation: without it there is no dense stream to refine towards.
    """

    pruner: Pruner
    compensation: TrainingSettings | None = None  # None: the pruner alone, without lines 6-8
    refinement: TrainingSettings | None = None  # None: no refinement, as in the paper
    export_dtype: str = "original"  # "original", "float32", "bfloat16", "float16"

    def __post_init__(self) -> None:
        if self.refinement is not None and self.compensation is None:
            raise ValueError("refinement needs compensation: set LampSettings.compensation, too")


@dataclass(frozen=True)
class LampBlock:
    """A finished block and the record of each stage that made it."""

    index: int  # from 0
    finished: FinishedBlock  # the state in the export dtype, and counts of each layer
    outcome: PruneOutcome  # pruning masks and quantization grids
    compensation: Training | None  # None: the block was not compensated
    refinement: Training | None  # None: the block was not refined


def lamp(context: StageContext, budget: Budget, settings: LampSettings) -> Iterator[LampBlock]:
    """Prune a model block by block, and yield each block once it is finished.

    Args:
        context: The model and its N samples; no samples for a pruner that needs no data.
        budget: How many weights of each layer are pruned. Blocks of the model beyond its end stay unchanged.
        settings: The pruner, compensation and refinement.

    Raises:
        NumericalError: A weight or a loss is not finite, or a Hessian has no Cholesky factor.
        ValueError: The budget depends on data, and the pruner needs none.
    """
    trains = settings.compensation is not None
    reads_data = trains or settings.pruner.needs_data
    biased = _new_stream(context) if reads_data else None  # z
    dense_out = _new_stream(context) if trains else None  # z': the dense output of the newest block
    if biased is not None:
        capture(context, biased, dense_out)  # lines 1-2
    blocks = _resolve(budget, biased)

    for i, block_budget in enumerate(blocks):
        block_context, is_last = context.block(i), i == len(blocks) - 1
        state = compensation = refinement = None

        if i > 0 and settings.compensation is not None:  # lines 6-8 of the paper's iteration for block i-1
            assert biased is not None
            assert dense_out is not None
            next_dense_out = _new_stream(context)
            compensated = compensate_block(block_context, biased, dense_out, next_dense_out, settings.compensation)
            state, compensation, dense_out = compensated.state, compensated.training, next_dense_out

        biased_out = _new_stream(context) if reads_data and not is_last else None
        output = BlockOutput(block_dtypes(context.model, i, settings.export_dtype), biased_out)
        if settings.refinement is None:
            pruned = prune_block(block_context, settings.pruner, block_budget, biased, state=state, output=output)
            finished = pruned.finished  # lines 4-5, 9
        else:
            assert biased is not None
            assert dense_out is not None
            pruned = prune_block(block_context, settings.pruner, block_budget, biased, state=state, output=None)  # 4, 9
            refined = refine_block(block_context, pruned, biased, dense_out, settings.refinement, output)
            finished, refinement = refined.finished, refined.training  # line 5, of the refined block
        assert finished is not None
        yield LampBlock(i, finished, pruned.outcome, compensation, refinement)
        biased = biased_out


def _new_stream(context: StageContext) -> ListStream:
    """An empty stream of N hidden states, (T, H), in the activation dtype of the device."""
    return ListStream(len(context.inputs), context.hidden_shape, context.device.torch_dtype)


def _resolve(budget: Budget, biased: ListStream | None) -> Sequence[BlockBudget]:
    """The counts of every block. biased: the input of block 0; None: there is no data."""
    if not callable(budget):
        return budget
    if biased is None:
        raise ValueError("a budget that depends on data needs a pruner that reads data")
    return budget(biased)
