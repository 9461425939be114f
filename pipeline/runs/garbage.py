"""Files of a run directory that no later step needs."""

from __future__ import annotations

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import releasable
from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps.lamp_plan import steps_of


def collect_garbage(run: RunDirectory, config: RunConfig, *, is_dry_run: bool) -> dict[str, int]:
    """Delete what the run does not need, or only list it: {key: bytes}."""
    steps = steps_of(run, config)
    done = [commit.step for commit in run.commits]
    released = run.made(releasable(steps, done))
    roots = [run.payload(name).root for name in released]
    found = {key: sum(run.storage.sizes(key).values()) for key in (*run.leftovers(), *roots) if run.storage.exists(key)}
    if not is_dry_run:
        run.release(released)
        run.clean()
    return found
