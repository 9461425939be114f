"""`lampctl init`: begin a run, and do none of its steps."""

from __future__ import annotations

from lampctl.cli.options import Chosen, RunDir, with_settings


@with_settings
def init(chosen: Chosen, run_dir: RunDir = None) -> None:
    """Begin a run: write its settings, budget and plan.

    Then do its steps one by one (calibrate, capture, prune-block, ...) or all of them (resume).

    \b
    lampctl init smollm2-135m --sparsity 0.6 --preset quick --run-dir runs/mine
    lampctl calibrate runs/mine
    lampctl capture runs/mine
    lampctl prune-block runs/mine
    lampctl compensate-block runs/mine     and so on for each block
    lampctl resume runs/mine               or all remaining steps
    """
    from lampctl.output import tables
    from pipeline.runs.lifecycle import start
    from pipeline.runs.prepare import prepare
    from pipeline.steps.lamp_plan import steps_of

    prepared = prepare(chosen.gather())
    run, config = start(prepared, run_dir if run_dir is not None else prepared.default_run_dir)
    tables.begun(run, config, prepared.origins, prepared.notices, steps_of(run, config))
