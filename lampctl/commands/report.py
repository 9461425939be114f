"""`lampctl report`: a page with plots of one run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PROMPTS = ("The capital of France is", "A function in Python is defined by", "Once upon a time")


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, finished or not.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the page and its plots: a new one, or an earlier report."),
    ],
    text: Annotated[
        bool,
        typer.Option(
            "--text/--no-text",
            help="Generate text with the original and the pruned models, which takes a whole model in memory; vision "
            "models show segmentation masks. [default: --text]",
        ),
    ] = True,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Prompt of the generated text. May be repeated. [default: three short ones]"),
    ] = None,
    text_tokens: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Number of generated tokens.")] = 40,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Device for text generation.")] = "auto",
) -> None:
    """Write one self-contained HTML page about runs, with its plots as PNG and CSV files beside it.

    \b
    lampctl report runs/opt-2.7b-s70-lamp --out report
    lampctl report runs/opt-* --out report --no-text
    """
    from lampctl.output.file_progress import showing_files
    from lampctl.report.write import write_report
    from pipeline.errors import ConfigError

    if prompt and not text:
        raise ConfigError("--prompt and --no-text exclude each other")
    prompts = tuple(prompt or _PROMPTS) if text else ()
    with showing_files("writing text") as callbacks:
        written = write_report(runs, out, prompts, text_tokens, device, callbacks)
    num_figures = sum(path.suffix == ".png" for path in written)
    print(f"{written[0]}: one page; its {num_figures} plots are in {written[0].parent / 'figures'}, as PNG and CSV")
