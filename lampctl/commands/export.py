"""`lampctl export`: a run's model as a folder or as one packed file, and a packed file as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lampctl.cli.options import with_changes
from lampctl.commands.steps import do_step
from pipeline.config.declarations import GivenSettings
from stages.formats.base import ExportFormat
from stages.formats.registry import EXPORT_FORMATS, file_formats, format_help, format_of


@with_changes("allow_environment_change", environment=("allow_environment_change",))
def export(
    changes: GivenSettings,
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run directory; with --format packed, also an exported model folder."),
    ] = None,
    model_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"{format_help()} [default: folder]",
        ),
    ] = None,
    unpack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Unpack a packed file into its model folder, bit for bit.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Path of the packed file or the unpacked folder. [default: RUN/<run>.packed.safetensors]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a packed file of another model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sizes as JSON.")] = False,
) -> None:
    """Write the pruned model as a folder that transformers opens, or as one small packed file.

    \b
    lampctl export runs/mine
    lampctl export runs/mine --format packed
    lampctl export runs/mine/model --format packed --out small.safetensors
    lampctl export --unpack small.safetensors --out my-model
    """
    from pipeline.errors import ConfigError

    if model_format is not None and model_format not in EXPORT_FORMATS:
        raise ConfigError(f"--format {model_format}: choose one of {', '.join(EXPORT_FORMATS.names)}")
    if unpack is not None:
        if run is not None or model_format is not None or force:
            raise ConfigError("--unpack FILE excludes RUN, --format and --force")
        if out is None:
            raise ConfigError("--unpack requires --out FOLDER")
        _unpack(unpack, out, as_json)
        return
    if run is None:
        raise ConfigError("name a run directory (lampctl export RUN) or a packed file (lampctl export --unpack FILE)")
    chosen = EXPORT_FORMATS.get(model_format or "folder")
    if chosen.suffix is not None:
        _pack(run, chosen, out, force, as_json)
        return
    if out is not None or force or as_json:
        formats = " or ".join(file_formats())
        raise ConfigError(f"--out, --force and --json belong to --format {formats}; the folder is always RUN/model")
    if not _show_again(run):
        do_step(run, "export", changes)


def _show_again(place: str) -> bool:
    """Write RUN/model again if the run is exported and the folder is gone. Returns whether it did."""
    from lampctl.output import tables
    from pipeline.runs.lifecycle import reopen
    from pipeline.runs.model_card import ModelView
    from pipeline.steps.committed import is_exported

    directory, config = reopen(place)
    if not is_exported(directory) or directory.is_published("model"):
        return False
    ModelView(directory, config).refresh()
    tables.model_is_back(directory)
    return True


def _pack(place: str, model_format: type[ExportFormat], out: Path | None, force: bool, as_json: bool) -> None:
    from lampctl.output.file_progress import showing_files
    from lampctl.output.packed import show_packed
    from pipeline.runs.packing import find_packable, pack_model

    source = find_packable(place)
    target = out or source.target(model_format)
    with showing_files(f"packing {source.folder}") as callbacks:
        pack_model(source, target, callbacks, model_format, force)
    show_packed(model_format.title, target, model_format.sizes(target), as_json)


def _unpack(file: Path, folder: Path, as_json: bool) -> None:
    from lampctl.output.file_progress import showing_files
    from lampctl.output.packed import show_packed
    from pipeline.runs.packing import unpack_model

    model_format = format_of(file)
    with showing_files(f"unpacking {file}") as callbacks:
        unpack_model(file, folder, callbacks, model_format)
    show_packed("model", folder, model_format.sizes(file), as_json)
