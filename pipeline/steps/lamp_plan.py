"""The plan of a run: LAMP Algorithm 1 as a list of steps, then the export and what follows it.

    calibrate -> capture -> [allocate] -> prune 0 -> [refine 0] -> compensate 1 -> prune 1 -> ... -> prune n-1
    -> [refine n-1] -> [teach] -> [generate] -> [distill] -> export -> [end-loss] -> evaluate ... -> zero-shot ...

`stages.lamp` is the same algorithm on streams in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Step
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.allocate import Allocate
from pipeline.steps.calibrate import Calibrate
from pipeline.steps.capture import Capture
from pipeline.steps.compensate_block import CompensateBlock
from pipeline.steps.distill import Distill
from pipeline.steps.export import Export
from pipeline.steps.generate import Generate
from pipeline.steps.prune_block import PruneBlock
from pipeline.steps.refine_block import RefineBlock
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.run_facts import facts_of
from pipeline.steps.teach import Teach
from stages.pruners.registry import reads_data


@dataclass(frozen=True)
class DistillationPlan:
    """How all blocks are trained together at the end.

    Attributes:
        draws: On samples of its own, not on the calibration set.
        takes_over: The blocks are those of another run, whose streams are gone.
        generates: The original model writes further samples.
    """

    draws: bool = False
    takes_over: bool = False
    generates: bool = False


def chain(
    num_blocks: int,
    *,
    compensates: bool,
    reads_data: bool = True,
    refines: bool = False,
    allocates: bool = False,
    distillation: DistillationPlan | None = None,
) -> tuple[Step, ...]:
    """The steps from the calibration set to the exported model, in the only order they can run (LAMP Alg. 1).

    Args:
        num_blocks: Number of blocks of the model.
        compensates: Each block after the first is trained to make up for the pruning error before it.
        reads_data: Pruning reads the calibration set.
        refines: Each pruned block is trained before its output is computed.
        allocates: A first pass of the original model decides the budget.
        distillation: How all blocks are trained together at the end; None: they are not.
    """
    last = num_blocks - 1
    draws = distillation is not None and distillation.draws
    teaches = distillation is not None and (draws or distillation.takes_over or not compensates)
    reads_dense_end = refines or (distillation is not None and not teaches)  # the output of the last block
    steps: list[Step] = []
    if reads_data or (distillation is not None and not draws):
        steps.append(Calibrate.step())
    if reads_data:
        steps.append(Capture.step(with_dense=compensates and (last > 0 or reads_dense_end)))
        if allocates:
            steps.append(Allocate.step())
    for block in range(num_blocks):
        is_compensated = compensates and block > 0
        if is_compensated:
            # The dense output of the last block is a target: further steps read it only to refine or distill.
            steps.append(CompensateBlock.step(block, with_dense=block < last or reads_dense_end))
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
    if distillation is not None:
        if teaches:
            steps.append(Teach.step(num_blocks, draws=draws))
        if distillation.generates:
            steps.append(Generate.step(num_blocks, draws=draws))
        steps.append(Distill.step(num_blocks, draws=draws, teaches=teaches, generates=distillation.generates))
    steps.append(Export.step(num_blocks, is_distilled=distillation is not None))
    return tuple(steps)


def chain_of(config: RunConfig, num_blocks: int) -> tuple[Step, ...]:
    """The steps from calibration to export that a configuration asks for."""
    return chain(
        num_blocks,
        compensates=config.is_lamp,
        # A method without data has a calibration set only to distill on.
        reads_data=config.calibration is not None and (not config.distill or reads_data(config.method)),
        refines=bool(config.refine),
        allocates=config.budget == "outliers",
        distillation=DistillationPlan(
            config.distill_samples is not None, config.from_run is not None, bool(config.distill_generated)
        )
        if config.distill
        else None,
    )


def plan_of(config: RunConfig, num_blocks: int) -> tuple[Step, ...]:
    """All steps that a configuration asks for."""
    later = [step for kind in STEP_KINDS.entries() for step in kind.after_export(config)]
    return (*chain_of(config, num_blocks), *later)


def steps_of(run: RunDirectory, config: RunConfig) -> tuple[Step, ...]:
    """All steps of a run under a configuration."""
    return plan_of(config, facts_of(run).model.num_blocks)
