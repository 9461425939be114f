"""A pruned model as one small file, and back: each appears on the disk whole and durable, or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.plan import next_steps
from pipeline.errors import ConfigError, RunNotFound, StepOrderError
from pipeline.rundir import filesystem
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.storage.locate import is_address
from pipeline.runs.lifecycle import reopen
from pipeline.steps.committed import is_exported
from pipeline.steps.lamp_plan import steps_of
from pipeline.steps.order import command_for
from stages.formats.base import ExportFormat
from stages.interfaces import Watcher


@dataclass(frozen=True)
class Packable:
    """A model folder that can be written as one file."""

    folder: Path
    beside: Path  # the default path of the file, without the format's suffix

    def target(self, model_format: type[ExportFormat]) -> Path:
        """The default path of the file."""
        return self.beside.with_name(f"{self.beside.name}{model_format.suffix}")


def find_packable(place: str) -> Packable:
    """The model of a run, after making sure that it is what was committed; or a folder that is a model itself.

    Raises StepOrderError, naming the command to call first, for a run that is not exported; RunNotFound; DamagedData.
    """
    is_remote = is_address(place)
    path = Path(place.rstrip("/").rpartition("/")[2] if is_remote else place).resolve()
    if is_remote or (path / "run.json").exists():
        run, config = reopen(place if is_remote else path)
        if not is_exported(run):
            todo = next_steps(steps_of(run, config), [commit.step for commit in run.commits])
            raise StepOrderError(
                f"there is no model to pack in {run.label} yet: call {command_for(todo[0], run.label)} first, or "
                f"lampctl resume {run.label} for all steps"
            )
        return Packable(published_model(run), Path(path.name).absolute() if is_remote else path / path.name)
    if not (path / "config.json").exists():
        raise RunNotFound(f"{path} is no run and no model folder: it has neither run.json nor config.json")
    return Packable(path, path)


def pack_model(
    source: Packable, target: Path, callbacks: Watcher, model_format: type[ExportFormat], replace: bool = False
) -> None:
    """Write the model folder as one file.

    A file of the same format and the same folder is kept.

    Args:
        source: The model folder.
        target: The file.
        callbacks: Asked for stops and informed of progress.
        model_format: A format that is one file.
        replace: Replace any other file.

    Raises:
        ConfigError: Another file is there and may not be replaced; the target is a folder or inside the model folder.
        OutOfDisk: The disk is full.
        DiskError: The disk cannot be written.
    """
    from stages.formats.base import FormatContext
    from stages.models.derived_files import derived_files

    context = FormatContext(callbacks, _RewritableFile, derived_files)
    target = target.absolute()
    if target.resolve().is_relative_to(source.folder.resolve()):
        raise ConfigError(f"--out {target} lies inside the model that is packed: name another place")
    if target.is_dir():
        raise ConfigError(f"--out {target} is a folder: name a file")
    if target.exists() and not replace:
        if model_format.holds(target, source.folder):
            return
        raise ConfigError(f"{target} is there already and holds something else: name another by --out, or use --force")
    filesystem.make_folder(target.parent)
    temporary = filesystem.temporary_folder(target)
    try:
        model_format.write(source.folder, temporary / target.name, context)
        filesystem.flush_tree(temporary)
        filesystem.rename(temporary / target.name, target)
        filesystem.flush_folder(target.parent)
    finally:
        filesystem.remove_tree(temporary)


def unpack_model(file: Path, folder: Path, callbacks: Watcher, model_format: type[ExportFormat]) -> None:
    """Make `folder`, which must be missing or empty, of a file of a format that can restore it.

    Raises UsageError where the folder holds something, and what `ExportFormat.restore` raises.
    """
    from stages.errors import UsageError
    from stages.formats.base import FormatContext
    from stages.models.derived_files import derived_files

    context = FormatContext(callbacks, _RewritableFile, derived_files)
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder} is there already and is not an empty folder: name a new one")
    filesystem.make_folder(folder.parent)
    temporary = filesystem.temporary_folder(folder)
    try:
        model_format.restore(file, temporary, context)
        filesystem.flush_tree(temporary)
        filesystem.rename(temporary, folder)
        filesystem.flush_folder(folder.parent)
    finally:
        filesystem.remove_tree(temporary)


def published_model(run: RunDirectory) -> Path:
    """The folder of a run's exported model, after making sure that it is still what was committed."""
    payload = run.payload("model")
    for file in payload.files:
        run.open_file("model", payload.inner(file))
    return run.publish("model")


class _RewritableFile(filesystem.FileWriter):
    """A new file in which one may go back, as the header of a packed file needs it; its digest means nothing then."""

    def seek(self, offset: int, /) -> None:
        """Go on writing at this byte."""
        assert self._descriptor is not None, "the file is closed"
        os.lseek(self._descriptor, offset, os.SEEK_SET)
