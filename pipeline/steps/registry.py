"""Registry of step kinds. Packages add kinds that run after the export by the entry point group lampctl.step_kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.registry import Registry

if TYPE_CHECKING:
    from pipeline.steps.base import StepKind

STEP_KINDS: Registry[type[StepKind[Any]]] = Registry(
    "step kind",
    {
        "calibrate": "pipeline.steps.calibrate:Calibrate",
        "capture": "pipeline.steps.capture:Capture",
        "allocate": "pipeline.steps.allocate:Allocate",
        "prune-block": "pipeline.steps.prune_block:PruneBlock",
        "refine-block": "pipeline.steps.refine_block:RefineBlock",
        "compensate-block": "pipeline.steps.compensate_block:CompensateBlock",
        "teach": "pipeline.steps.teach:Teach",
        "generate": "pipeline.steps.generate:Generate",
        "distill": "pipeline.steps.distill:Distill",
        "export": "pipeline.steps.export:Export",
        "end-loss": "pipeline.steps.end_loss:EndLossStep",
        "evaluate": "pipeline.steps.evaluate:Evaluate",
        "zero-shot": "pipeline.steps.zero_shot:ZeroShotStep",
    },
    base="pipeline.steps.base:StepKind",
)

# Help of the kinds that have a command of their own, in the order of the steps: `lampctl --help` imports no kind.
STEP_COMMANDS: Mapping[str, str] = {
    "calibrate": "Read the calibration samples and tokenize or preprocess them.",
    "capture": "Run the embeddings on the calibration set and record the input of block 0.",
    "allocate": "Give each block its share of the sparsity by a pass of the original model (--budget outliers).",
    "prune-block": "Choose the pruning masks of a block and set its remaining weights.",
    "refine-block": "Train a pruned block towards its dense output with its pruning masks fixed (--refine).",
    "compensate-block": "Train a block so that it undoes the error of the pruned blocks before it.",
    "teach": "Run the original model on the samples to distill on (--distill).",
    "generate": "Let the original model write samples to distill on, and run it on them (--distill-generated).",
    "distill": (
        "Train all pruned blocks together towards the original model's output, with their masks fixed (--distill)."
    ),
}
