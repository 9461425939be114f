"""Registry of step kinds. Packages add kinds that run after the export by the entry point group lampctl.step_kinds."""

from __future__ import annotations

from pipeline.steps.base import StepKind
from stages.registry import Registry

STEP_KINDS: Registry[type[StepKind]] = Registry(
    "step kind",
    {
        "calibrate": "pipeline.steps.calibrate:Calibrate",
        "capture": "pipeline.steps.capture:Capture",
        "allocate": "pipeline.steps.allocate:Allocate",
        "prune-block": "pipeline.steps.prune_block:PruneBlock",
        "refine-block": "pipeline.steps.refine_block:RefineBlock",
        "compensate-block": "pipeline.steps.compensate_block:CompensateBlock",
        "export": "pipeline.steps.export:Export",
        "evaluate": "pipeline.steps.evaluate:Evaluate",
        "zero-shot": "pipeline.steps.zero_shot:ZeroShotStep",
    },
)
