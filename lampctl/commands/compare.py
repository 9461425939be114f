"""`lampctl compare`: the results of several runs or models in one table."""

from __future__ import annotations

from typing import Annotated

import typer


def compare(
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
            help="Measure the perplexity of model folders on these data sources; runs have theirs. [default: none]",
        ),
    ] = None,
    eval_seqlen: Annotated[
        int | None,
        typer.Option(metavar="T", min=2, help="With --evaluate: tokens per window. [default: as in the runs]"),
    ] = None,
    eval_max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="With --evaluate: stop after N tokens. [default: all]")
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
    from pipeline.runs.comparison import Measure, standings

    if as_json + as_csv + as_markdown > 1:
        raise ConfigError("--json, --csv and --markdown exclude each other: choose one")
    names = tuple(name.strip() for name in (sources or "").split(",") if name.strip())
    if not names and (eval_seqlen or eval_max_tokens):
        raise ConfigError("--eval-seqlen and --eval-max-tokens require --evaluate")
    with showing_files("looking through models") as callbacks:
        table = comparison.compare(standings(places, Measure(names, eval_seqlen, eval_max_tokens), callbacks))
    if as_json:
        print(comparison.as_json(table))
    elif as_csv:
        print(comparison.as_csv(table), end="")
    elif as_markdown:
        print(comparison.as_markdown(table), end="")
    else:
        tables.comparison(table)
