"""`lampctl evaluate`: perplexity, zero-shot accuracy or IoU of a run or of any model."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def evaluate(  # noqa: PLR0913 - one parameter per flag
    place: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run directory (a folder, or an address in a bucket), or a model: folder, GGUF file, alias, or name "
            "on the Hugging Face hub.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--evaluate",
            metavar="SRC,...",
            help="Measure perplexity on these data sources: wikitext2, ptb, c4 (from the hub, or a local copy as in "
            "wikitext2:PATH), pydocs, text:PATH; Segment Anything: IoU on coco:DIR, sa1b:DIR; '' for none. "
            "[default: wikitext2, or none with --tasks; for a run: as last used in it]",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Zero-shot accuracy on these tasks of lm-evaluation-harness (extra `eval`); zero-shot: boolq, rte, "
            "hellaswag, winogrande, arc_easy, arc_challenge, openbookqa. [default: zero-shot with --task-data or "
            "--limit, else none; for a run: as last used in it]",
        ),
    ] = None,
    task_data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder with the tasks' rows (docs/evaluation.md). [default: the hub]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "--task-limit",
            metavar="N",
            min=1,
            help="Only the first N rows of each task: a quick look, marked as partial.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="More metrics on the same data sources: those of installed packages. [default: none; of a run: as "
            "last used in it]",
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            "--eval-seqlen",
            metavar="T",
            min=2,
            help="Tokens per window. [default: 2048, at most the model's limit; for a run: as last used in it]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--eval-max-tokens",
            metavar="N",
            min=2,
            help="Stop after N tokens: a quick look, marked as partial.",
        ),
    ] = None,
    points: Annotated[
        str | None,
        typer.Option(
            "--points",
            "--eval-points",
            metavar="WHERE",
            help="Segment Anything: auto, annotation, interior, random or box-center, as in lampctl run. [default: "
            "auto; for a run: as last used in it]",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            "--max-images",
            "--eval-max-images",
            metavar="N",
            min=1,
            help="Stop after N images: a quick look, marked as partial.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEV", help="For a model: auto, cpu, cuda or cuda:N. [default: auto]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="For a model: dtype of the computation, as in lampctl run. [default: auto]"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="For a model on the hub: branch, tag or commit.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code", help="For a model: run the Python code that it comes with."
        ),
    ] = None,
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
    from pipeline.config.checks import split_commas
    from pipeline.errors import ConfigError
    from pipeline.runs.model_evaluation import names_run

    changes = {
        "metrics": split_commas(metrics) if metrics is not None else None,
        "eval_seqlen": seqlen,
        "eval_max_tokens": max_tokens,
        "eval_points": points,
        "eval_max_images": max_images,
        "tasks": tasks,
        "task_data": task_data,
        "task_limit": limit,
    }
    of_model = {"device": device, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    given = {name: value for name, value in of_model.items() if value is not None}
    if not names_run(place):
        _evaluate_model(place, data, changes, given, as_json)
        return
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{flags}: {place} is a run, whose settings fix this; evaluate {place}/model to choose")
    _evaluate_run(place, data, changes, as_json)


def _evaluate_run(place: str, sources: str | None, changes: dict[str, Any], as_json: bool) -> None:
    from lampctl.cli.stop_sources import stopping
    from lampctl.output import tables
    from lampctl.output.progress import listening
    from pipeline.runs.evaluations import change_evaluation, require_exported
    from pipeline.runs.lifecycle import reopen, resume

    directory, config = reopen(place, is_resuming=True)
    require_exported(directory, config)
    config = change_evaluation(directory, config, sources, changes)
    with listening() as listener, stopping(config) as stop:
        listener.attach(directory, config)
        resume(directory, config, listener, stop)
    tables.results([directory], [config], as_json)


def _evaluate_model(
    place: str, sources: str | None, wanted: dict[str, Any], given: dict[str, Any], as_json: bool
) -> None:
    from lampctl.output.accuracy import model_figures
    from lampctl.output.file_progress import showing_files
    from pipeline.runs.model_evaluation import measure_model, wanted_of
    from stages.models.resolve import resolve

    what = wanted_of(sources, wanted, device=given.get("device", "auto"), dtype=given.get("dtype", "auto"))
    folder = resolve(place, given.get("revision"), trusts_code=given.get("trust_remote_code", False))
    model_figures(measure_model(folder, what, showing_files), as_json)
