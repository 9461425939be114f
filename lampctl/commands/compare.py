"""`lampctl compare`: the results of several runs or models in one table."""

from __future__ import annotations

from typing import Annotated

import typer

from lampctl.cli.options import with_changes
from pipeline.config.declarations import GivenSettings


@with_changes("eval_seqlen", "eval_max_tokens", "metrics", default="as in the first run")
def compare(
    changes: GivenSettings,
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL...",
            help="Run directories, and folders of other models. Differences are relative to the first.",
        ),
    ],
    sources: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="SRC,...",
            help="Measure model folders on these data sources; runs have their own results. [default: none]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print it as CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
) -> None:
    """Show runs and models side by side: perplexity, achieved sparsity, size, time and peak memory.

    \b
    lampctl compare runs/opt-2.7b-s70-lamp runs/opt-2.7b-s70-sparsegpt
    lampctl compare runs/mine other-model --evaluate wikitext2
    lampctl compare runs/* --markdown
    """
    from lampctl.output import comparison, tables
    from lampctl.output.file_progress import showing_files
    from pipeline.errors import ConfigError
    from pipeline.runs.comparison import summaries
    from pipeline.runs.model_evaluation import EvaluationRequest, request_of

    if as_json + as_csv + as_markdown > 1:
        raise ConfigError("--json, --csv and --markdown exclude each other: choose one")
    if not sources and changes:
        raise ConfigError("--eval-seqlen, --eval-max-tokens and --metrics require --evaluate")
    request = request_of({**changes, "evaluate": sources}) if sources else EvaluationRequest()
    with showing_files("looking through models") as callbacks:
        table = comparison.compare(summaries(places, request, callbacks))
    if as_json:
        print(comparison.as_json(table))
    elif as_csv:
        print(comparison.as_csv(table), end="")
    elif as_markdown:
        print(comparison.as_markdown(table), end="")
    else:
        tables.comparison(table)
