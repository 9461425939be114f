"""The plan of a run: LAMP Algorithm 1 as a list of steps, then the export and what follows it.

    calibrate -> capture -> [allocate] -> prune 0 -> [refine 0] -> compensate 1 -> prune 1 -> ... -> prune n-1
    -> [refine n-1] -> export -> evaluate ... -> zero-shot ...

`stages.lamp` is the same algorithm on streams in memory.
"""

from __future__ import annotations

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Step
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.allocate import Allocate
from pipeline.steps.calibrate import Calibrate
from pipeline.steps.capture import Capture
from pipeline.steps.compensate_block import CompensateBlock
from pipeline.steps.export import Export
from pipeline.steps.prune_block import PruneBlock
from pipeline.steps.refine_block import RefineBlock
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.run_facts import facts_of


def chain(
    num_blocks: int,
    *,
    compensates: bool,
    reads_data: bool = True,
    refines: bool = False,
    allocates: bool = False,
) -> tuple[Step, ...]:
    """The steps from the calibration set to the exported model, in the only order they can run (LAMP Alg. 1).

    Args:
        num_blocks: Number of blocks of the model.
        compensates: Each block after the first is trained to make up for the pruning error before it.
        reads_data: There is a calibration set.
        refines: Each pruned block is trained before its output is computed.
        allocates: A first pass of the original model decides the budget.
    """
    last = num_blocks - 1
    steps: list[Step] = []
    if reads_data:
        steps.append(Calibrate.step())
        steps.append(Capture.step(with_dense=compensates and (last > 0 or refines)))
        if allocates:
            steps.append(Allocate.step())
    for block in range(num_blocks):
        is_compensated = compensates and block > 0
        if is_compensated:
            # The dense output of the last block is a target only: no later step reads it unless the block is refined.
            steps.append(CompensateBlock.step(block, with_dense=block < last or refines))
        steps.append(
            PruneBlock.step(
                block,
                reads_data=reads_data,
                reads_compensated=is_compensated,
                writes_unrefined=refines,
                with_output=reads_data and block < last,
            )
        )
        if refines:
            steps.append(RefineBlock.step(block, with_output=block < last))
    steps.append(Export.step(num_blocks))
    return tuple(steps)


def chain_of(config: RunConfig, num_blocks: int) -> tuple[Step, ...]:
    """The steps from calibration to export that a configuration asks for."""
    return chain(
        num_blocks,
        compensates=config.is_lamp,
        reads_data=config.calibration is not None,
        refines=bool(config.refine),
        allocates=config.budget == "outliers",
    )


def plan_of(config: RunConfig, num_blocks: int) -> tuple[Step, ...]:
    """All steps that a configuration asks for."""
    later = [step for kind in STEP_KINDS.entries() for step in kind.after_export(config)]
    return (*chain_of(config, num_blocks), *later)


def steps_of(run: RunDirectory, config: RunConfig) -> tuple[Step, ...]:
    """All steps of a run under a configuration."""
    return plan_of(config, facts_of(run).model.num_blocks)
