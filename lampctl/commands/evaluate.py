"""`lampctl evaluate`: perplexity, zero-shot accuracy or IoU of a run or of any model."""

from __future__ import annotations

from typing import Annotated

import typer

from lampctl.cli.options import with_changes
from pipeline.config.declarations import GivenSettings

_OF_MODEL = ("device", "dtype", "bos", "chat_template", "revision", "trust_remote_code")


@with_changes(
    *("evaluate", "tasks", "task_data", "task_limit", "metrics", "end_loss"),
    *("eval_seqlen", "eval_max_tokens", "eval_points", "eval_max_images", *_OF_MODEL, "allow_environment_change"),
    environment=("allow_environment_change",),
    flags={
        "evaluate": "--data",
        "task_limit": "--limit",
        "eval_seqlen": "--seqlen",
        "eval_max_tokens": "--max-tokens",
        "eval_points": "--points",
        "eval_max_images": "--max-images",
    },
    default="for a model as in lampctl run, for a run as last used in it",
)
def evaluate(
    changes: GivenSettings,
    place: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run directory (a folder, or an address in a bucket), or a model: folder, GGUF file, alias, or name "
            "on the Hugging Face hub.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure perplexity, zero-shot accuracy or single-point IoU, of a run or of any model.

    A run records the metrics of its pruned and its original model (lampctl status shows them) and remembers the options
    given here. Metrics of a model are only printed.

    \b
    lampctl evaluate runs/mine
    lampctl evaluate runs/mine --data pydocs,text:notes.txt --seqlen 512
    lampctl evaluate runs/mine --tasks zero-shot
    lampctl evaluate opt-125m --data wikitext2,ptb,c4
    lampctl evaluate sam-vit-b --data coco:val2017 --max-images 100
    lampctl evaluate ./my-model --tasks arc_easy,boolq --task-data rows --limit 100 --json
    """
    from pipeline.errors import ConfigError
    from pipeline.runs.model_evaluation import names_run

    if not names_run(place):
        if "end_loss" in changes:
            raise ConfigError(
                f"--end-loss: {place} is a model that belongs to no run, so there is none to compare with"
            )
        _evaluate_model(place, changes, as_json)
        return
    fixed = [name for name in _OF_MODEL if name in changes]
    if fixed:
        flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ConfigError(f"{flags}: {place} is a run, whose settings fix this; evaluate {place}/model to choose")
    _evaluate_run(place, changes, as_json)


def _evaluate_run(place: str, changes: GivenSettings, as_json: bool) -> None:
    from lampctl.cli.stop_sources import stopping
    from lampctl.output import tables
    from lampctl.output.progress import listening
    from pipeline.runs.evaluations import change_evaluation, require_exported
    from pipeline.runs.lifecycle import reopen, resume

    directory, config = reopen(place, is_resuming=True)
    require_exported(directory, config)
    config = change_evaluation(directory, config, changes)
    with listening() as listener, stopping(config) as stop:
        listener.attach(directory, config)
        resume(directory, config, listener, stop)
    tables.results([directory], [config], as_json)


def _evaluate_model(place: str, given: GivenSettings, as_json: bool) -> None:
    from lampctl.output.accuracy import model_results
    from lampctl.output.file_progress import showing_files
    from pipeline.config.settings import Settings
    from pipeline.runs.model_evaluation import evaluate_model, request_of
    from stages.models.resolve import resolve

    settings = Settings.of({**given, "model": place})
    folder = resolve(place, settings.revision, trusts_code=settings.trust_remote_code)
    model_results(evaluate_model(folder, request_of(given), showing_files), as_json)
