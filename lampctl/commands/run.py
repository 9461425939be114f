"""`lampctl run`: a whole run and its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lampctl.cli.options import Chosen, RunDir, with_settings

if TYPE_CHECKING:
    from lampctl.output.progress import ProgressListener
    from pipeline.config.run_config import RunConfig
    from pipeline.engine.stop import StopRequest
    from pipeline.rundir.run_directory import RunDirectory
    from pipeline.runs.prepare import Prepared


@with_settings
def run(
    chosen: Chosen,
    takeover: Annotated[
        bool,
        typer.Option("--takeover", rich_help_panel="Stopping", help="Take over a run that another process works on."),
    ] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            rich_help_panel="Method",
            help="Also prune with METHOD, in a run of its own. May be repeated.",
        ),
    ] = None,
    run_dir: RunDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Prune MODEL, and measure the pruned and the original model.

    The same command continues an unfinished run, and does nothing for a finished one.

    \b
    lampctl run smollm2-135m --sparsity 0.6 --preset quick --baseline sparsegpt
    lampctl run facebook/opt-125m --sparsity 0.7 --calibration text:notes.txt --evaluate wikitext2,ptb
    lampctl run ./my-model --sparsity 0.5 --method wanda --run-dir runs/mine
    lampctl run --config settings.yaml
    """
    from lampctl.cli.stop_sources import stopping
    from lampctl.output import tables
    from lampctl.output.progress import listening
    from pipeline.config.adjust import sibling
    from pipeline.errors import ConfigError
    from pipeline.runs.prepare import prepare

    gathered = chosen.gather()
    prepared = prepare(gathered, baseline or ())
    others: list[Prepared] = []
    for method in baseline or ():
        if method in (prepared.config.method, *(other.config.method for other in others)):
            raise ConfigError(f"--baseline {method}: this method runs already; leave it out")
        others.append(prepare(sibling(gathered, method)))
    place = run_dir if run_dir is not None else prepared.default_run_dir
    beside = [
        other.default_run_dir if run_dir is None else _sibling_of(run_dir, other.config.method) for other in others
    ]
    with listening() as listener, stopping(prepared.config) as stop:
        main = _do(prepared, place, listener, stop, takeover)
        rest = [
            _do(other, place, listener, stop, takeover, shared_with=main[0])
            for other, place in zip(others, beside, strict=True)
        ]
    runs, configs = zip(main, *rest, strict=True)
    tables.results(runs, configs, as_json)


def _sibling_of(run_dir: str, method: str) -> str | Path:
    """The run directory of a baseline: beside the run's, with the method's name added."""
    from pipeline.errors import ConfigError
    from pipeline.rundir.storage.locate import beside

    place = beside(run_dir, method)
    if place is None:
        raise ConfigError(
            f"--run-dir {run_dir} has no name, so --baseline cannot put a run beside it; use a folder below it"
        )
    return place


def _do(
    prepared: Prepared,
    place: str | Path,
    listener: ProgressListener,
    stop: StopRequest,
    takeover: bool,
    shared_with: RunDirectory | None = None,
) -> tuple[RunDirectory, RunConfig]:
    from pipeline.runs.lifecycle import ResumeOptions, resume, start

    run, config = start(prepared, place)
    for notice in prepared.notices:
        listener.warn(notice)
    listener.attach(run, config)
    resume(run, config, listener, stop, ResumeOptions(shared_with=shared_with, takeover=takeover))
    return run, config
