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
from pipeline.steps.lamp_plan import steps_of
from stages.formats.packed.layout import PackedSizes
from stages.interfaces import Watcher


@dataclass(frozen=True)
class Packable:
    """A model folder that can be packed, and where the packed file belongs unless somebody says otherwise."""

    folder: Path
    target: Path


def find_packable(place: str) -> Packable:
    """The model of a run, after making sure that it is what was committed; or a folder that is a model itself.

    Raises StepOrderError, naming the step to do first, for a run that is not exported; RunNotFound; DamagedData.
    """
    is_remote = is_address(place)
    path = Path(place.rstrip("/").rpartition("/")[2] if is_remote else place).resolve()
    if is_remote or (path / "run.json").exists():
        run, config = reopen(place if is_remote else path)
        if run.commit_for("export") is None:
            todo = next_steps(steps_of(run, config), [commit.step for commit in run.commits])
            raise StepOrderError(f"there is no model to pack in {run.label} yet: do {todo[0].name} first")
        name = f"{path.name}.packed.safetensors"
        return Packable(published_model(run), Path(name).absolute() if is_remote else path / name)
    if not (path / "config.json").exists():
        raise RunNotFound(f"{path} is no run and no model folder: it has neither run.json nor config.json")
    return Packable(path, path.with_name(f"{path.name}.packed.safetensors"))


def pack_model(source: Packable, target: Path, callbacks: Watcher, replace: bool = False) -> PackedSizes:
    """Pack the model folder as the file `target`; how large it is.

    A packed file of the very same folder is left as it is. Raises ConfigError for any other file there, unless it may
    be replaced, and for a target inside the model folder; OutOfDisk, DiskError; and what
    `stages.formats.packed.writer.pack` raises.
    """
    from stages.formats.packed.layout import packed_sizes
    from stages.formats.packed.writer import pack

    target = target.absolute()
    if target.resolve().is_relative_to(source.folder.resolve()):
        raise ConfigError(f"--out {target} lies inside the model that is packed: name another place")
    if target.is_dir():
        raise ConfigError(f"--out {target} is a folder: name a file")
    if target.exists() and not replace:
        if _is_packed_already(target, source.folder):
            return packed_sizes(target)
        raise ConfigError(f"{target} is there already and holds something else: name another by --out, or use --force")
    filesystem.make_folder(target.parent)
    temporary = filesystem.temporary_folder(target)
    try:
        sizes = pack(source.folder, temporary / target.name, callbacks, _RewritableFile)
        filesystem.flush_tree(temporary)
        filesystem.rename(temporary / target.name, target)
        filesystem.flush_folder(target.parent)
    finally:
        filesystem.remove_tree(temporary)
    return sizes


def unpack_model(packed: Path, folder: Path, callbacks: Watcher) -> None:
    """Make `folder`, which must be missing or empty, of a packed file.

    Raises what `stages.formats.packed.reader.unpack` raises.
    """
    from stages.errors import UsageError
    from stages.formats.packed.reader import unpack

    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder} is there already and is not an empty folder: name a new one")
    filesystem.make_folder(folder.parent)
    temporary = filesystem.temporary_folder(folder)
    try:
        unpack(packed, temporary, callbacks, _RewritableFile)
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


def _is_packed_already(target: Path, folder: Path) -> bool:
    from stages.errors import DamagedFileError, UsageError
    from stages.formats.packed.layout import open_packed, read_contents
    from stages.formats.packed.writer import is_packed_from

    try:
        with open_packed(target) as file:
            return is_packed_from(read_contents(file), folder)
    except (UsageError, DamagedFileError):
        return False


class _RewritableFile(filesystem.FileWriter):
    """A new file in which one may go back, as the header of a packed file needs it; its digest means nothing then."""

    def seek(self, offset: int, /) -> None:
        """Go on writing at this byte."""
        assert self._descriptor is not None, "the file is closed"
        os.lseek(self._descriptor, offset, os.SEEK_SET)
