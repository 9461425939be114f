"""The run directory: what has been done, kept so that nothing short of losing the disk can undo or blur it.

    run.json              written once: what this run is
    commits/000007.json   written once each: a step is done; the file names are the order
    data/<attempt>/       what a commit points at, or what an attempt left that never came to be committed
    model/                a view of the exported model: hard links into data/
    events.jsonl          for people; losing it loses nothing

The state of a run is the fold over its contiguous commits, and nothing else. A step's files are durable before
its commit appears, and the commit appears whole, in one step that only one process can win.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import disk
from pipeline.attempt import Attempt, PayloadFolder
from pipeline.disk import FileDigest
from pipeline.errors import (
    DamagedData,
    DiskError,
    FileExists,
    FileGone,
    NotARun,
    RunNotFound,
    StepOrderError,
    Superseded,
)
from pipeline.manifest import Payload, RunManifest, StepCommit, finite_or_null, relative_path

if TYPE_CHECKING:
    from pipeline.store import ActivationStream

__all__ = ["Attempt", "PayloadFolder", "RunDirectory", "find_runs"]

log = logging.getLogger(__name__)

_MANIFEST = "run.json"
_NOT_VIEWS = {_MANIFEST, "commits", "data", "progress", "lease.json", "events.jsonl"}
_ATTEMPT = re.compile(r"^([0-9]{6})-[0-9a-f]{8}$")
_NO_REMEDY = "Put it back from a copy of the run directory, or start over in a new one; what it held cannot be rebuilt"


class RunDirectory:
    """A run on disk, as it was when it was opened plus what was committed through this object."""

    def __init__(self, path: Path, manifest: RunManifest, commits: tuple[StepCommit, ...]) -> None:
        self.path = path
        self.manifest = manifest
        self.commits = commits
        self._real_path = path.resolve()
        self._checked: set[str] = set()

    @classmethod
    def create(cls, path: Path, manifest: RunManifest) -> RunDirectory:
        """A new run at `path`, which must be missing or empty.

        Raises NotARun for a folder that holds something else; FileExists if there is a run already.
        """
        path = Path(path).absolute()
        if (path / _MANIFEST).exists():
            raise FileExists(f"{path} holds a run already")
        in_the_way = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
        if in_the_way is not None:
            raise NotARun(f"no run can be made at {path}: {in_the_way} is a file. Name a new folder by --run-dir")
        if not _is_free(path):
            raise NotARun(
                f"{path} is not empty and holds no run: nothing was written there. Name a new folder by --run-dir"
            )
        disk.make_folder(path)
        disk.write_new(path / _MANIFEST, manifest.to_bytes())
        return cls(path, manifest, ())

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run at `path`, replayed from its commits.

        Raises RunNotFound; NotARun; DamagedData naming the record that is torn, foreign or missing;
        ConfigMismatch if it was written by a newer version.
        """
        path = Path(path).absolute()
        if path.exists() and not path.is_dir():
            raise NotARun(f"{path} is no folder")
        try:
            manifest = RunManifest.read(path / _MANIFEST, _NO_REMEDY)
        except FileGone:
            if _is_free(path):
                raise RunNotFound(f"there is no run at {path}: {path / _MANIFEST} is missing") from None
            raise NotARun(f"{path} is no run directory: it has no {_MANIFEST}") from None
        return cls(path, manifest, _replay(path, manifest))

    def commit_for(self, step: str) -> StepCommit | None:
        """The commit of a step, by its name; None if it has not been done."""
        return next((commit for commit in self.commits if commit.step == step), None)

    @property
    def budget(self) -> list[Any]:
        """The budget by block: of the step that looked at the data, if there was one, else as the run began."""
        allocated = self.commit_for("allocate")
        table: list[Any] = allocated.figures["budget"] if allocated else self.manifest.budget
        return table

    def payload(self, name: str) -> Payload:
        """The payload of that name, of the newest commit that made one. Raises StepOrderError."""
        return self._find(name)[1]

    def begin(self, step: str) -> Attempt:
        """A fresh attempt at `step`, which will be the next commit. Raises StepOrderError if it is done."""
        if self.commit_for(step) is not None:
            raise StepOrderError(f"{step} is already done in {self.path}")
        number = len(self.commits)
        disk.make_folder(self.path / "data")
        path = self.path / "data" / f"{number:06d}-{secrets.token_hex(4)}"
        disk.make_new_folder(path)
        return Attempt(self, number, step, path)

    def commit(
        self,
        attempt: Attempt,
        *,
        figures: Mapping[str, Any],
        free: Mapping[str, Any],
        started_at: datetime,
        elapsed_s: float,
        peak_memory_bytes: int | None = None,
    ) -> StepCommit:
        """Make the attempt's step done, for good: when this returns, no crash can undo it.

        Raises Superseded if another process has committed this step; DamagedData if a payload is incomplete;
        StepOrderError if the attempt is not for the next commit.
        """
        number = len(self.commits)
        if attempt.number != number:
            raise StepOrderError(f"{attempt.id} was begun as commit {attempt.number}, the next one is {number}")
        commit = StepCommit.new(
            number=number,
            step=attempt.step,
            parent=self.commits[-1].digest if self.commits else self.manifest.digest,
            attempt=attempt.id,
            payloads=attempt.seal(),
            figures=dict(figures),
            free=dict(free),
            started_at=started_at,
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
        )
        path = _commit_path(self.path, number)
        disk.make_folder(path.parent)
        try:
            disk.flush_tree(attempt.path)
            disk.flush_folder(attempt.path.parent)
            disk.write_new(path, commit.to_bytes())
        except FileGone:
            self.check_superseded()
            raise
        except FileExists:
            winner = _read_commit(path)
            if winner.attempt != attempt.id:
                raise _superseded_by(path) from None
            # Ours, from a first try whose answer was lost.
            commit = winner
        self.commits = (*self.commits, commit)
        return commit

    def open_stream(self, name: str) -> ActivationStream:
        """A committed activation stream, to read; each file is checked when it is first read.

        Raises StepOrderError; MissingChunk or DamagedData; Superseded if another process is ahead.
        """
        from pipeline.store import open_stream

        commit, payload = self._find(name)
        root = self.inside(payload.root)
        origin = f"{name} of {commit.step}"
        return open_stream(root, payload, origin, self.check_superseded, self._checked)

    def open_file(self, name: str, filename: str | None = None) -> Path:
        """The path of a committed file, checked once against its sha256.

        filename: which file, for a payload of several, relative to its root.
        Raises StepOrderError; DamagedData; Superseded if another process is ahead.
        """
        commit, payload = self._find(name)
        file = payload.files[0] if filename is None else payload.file(filename)
        path = self.inside(file.path)
        if str(path) in self._checked:
            return path
        try:
            found = disk.hash_file(path)
        except FileGone:
            self.check_superseded()
            raise DamagedData(f"{path} ({name} of {commit.step}) is missing. {_NO_REMEDY}") from None
        if found != FileDigest(file.size, file.sha256):
            raise DamagedData(
                f"{path} ({name} of {commit.step}) is damaged: its sha256 is not the committed one. "
                f"Nothing was computed with it. {_NO_REMEDY}"
            )
        self._checked.add(str(path))
        return path

    def release(self, names: Iterable[str]) -> None:
        """Delete the files of payloads that nobody will read again. Released already is fine."""
        for name in names:
            root = self.inside(self.payload(name).root)
            if root.exists():
                # In one step, so that a payload is there or released, never half of it.
                disk.remove_tree(disk.set_aside(root))

    def clean(self) -> None:
        """Delete what crashes have left: attempts that came to nothing, temporaries, scratch.

        An attempt at a step that is not committed yet is left alone, since whoever works on it may still
        commit it; and so are temporaries of a commit to come.
        """
        kept = {commit.attempt for commit in self.commits}
        settled = {f"{commit.number:06d}.json" for commit in self.commits}
        for path in _children(self.path / "data"):
            match = _ATTEMPT.match(path.name)
            if match and int(match[1]) < len(self.commits) and path.name not in kept:
                disk.remove_tree(path)
        for path in _children(self.path / "commits"):
            leftover = disk.LEFTOVER.match(path.name)
            if leftover and leftover["name"] in settled:
                disk.remove_file(path)
        for folder in [self.path, *(self.path / "data" / attempt for attempt in kept)]:
            for path in _children(folder):
                if disk.LEFTOVER.match(path.name):
                    _remove(path)

    def publish(self, name: str, target: str = "model") -> Path:
        """The folder `target` in the run directory, showing a committed payload by hard links.

        It appears complete or not at all; one that shows this payload already is left as it is, another one
        is replaced.
        """
        if "/" in target:
            raise ValueError(f"{target} is no name of a folder in the run directory")
        payload = self.payload(name)
        view = self._view(target)
        sources = {payload.inner(file): self.inside(file.path) for file in payload.files}
        if self.is_published(name, target):
            return view
        temporary = disk.temporary_folder(view)
        for inner, source in sources.items():
            disk.make_folder((temporary / inner).parent)
            disk.link_or_copy(source, temporary / inner)
        disk.flush_tree(temporary)
        older = disk.set_aside(view) if view.exists() else None
        disk.rename(temporary, view)
        disk.flush_folder(view.parent)
        if older is not None:
            _remove(older)
        return view

    def is_published(self, name: str, target: str = "model") -> bool:
        """Whether the folder `target` shows all of a committed payload."""
        payload, view = self.payload(name), self._view(target)
        return all(_is_same(self.inside(file.path), view / payload.inner(file)) for file in payload.files)

    def write_view(self, path: str, contents: bytes) -> Path:
        """Write or replace a file that no commit vouches for, such as model/README.md."""
        view = self._view(path)
        disk.make_folder(view.parent)
        disk.replace_file(view, contents, self.path)
        return view

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl."""
        line = {"at": datetime.now(UTC).isoformat(), "kind": kind, **finite_or_null(fields)}
        try:
            disk.append_line(self.path / "events.jsonl", json.dumps(line))
        except DiskError as error:
            # Losing a line loses nothing, and a disk that is full will be noticed by what counts.
            log.warning("events.jsonl is not written: %s", error)

    def check_superseded(self) -> None:
        """Raise Superseded if another process has made the commit that would be next here."""
        path = _commit_path(self.path, len(self.commits))
        if path.exists():
            raise _superseded_by(path)

    def inside(self, path: str) -> Path:
        """The full path of a recorded one. Raises DamagedData if a link leads it out of the run directory."""
        full = self.path / relative_path(path)
        if not full.resolve().is_relative_to(self._real_path):
            raise DamagedData(f"{full} leads out of the run directory: it was not followed")
        return full

    def _view(self, path: str) -> Path:
        if relative_path(path).split("/")[0] in _NOT_VIEWS or path.startswith("."):
            raise ValueError(f"{path} is no place for a view")
        return self.inside(path)

    def _find(self, name: str) -> tuple[StepCommit, Payload]:
        for commit in reversed(self.commits):
            if name in commit.payloads:
                return commit, commit.payloads[name]
        raise StepOrderError(f"no step of {self.path} has made {name} yet")


def find_runs(root: Path) -> list[Path]:
    """The run directories right under `root`, the one begun last first."""
    begun = [(path.stat().st_mtime_ns, path.parent) for path in Path(root).glob(f"*/{_MANIFEST}")]
    return [path for _, path in sorted(begun, reverse=True)]


def _replay(path: Path, manifest: RunManifest) -> tuple[StepCommit, ...]:
    """All commits from number 0 up, checked to be one unbroken chain that starts at this run.json."""
    commits: list[StepCommit] = []
    while True:
        number = len(commits)
        record = _commit_path(path, number)
        try:
            commit = _read_commit(record)
        except FileGone:
            last = _last_number(path / "commits")
            if last < number:
                return tuple(commits)
            # Unless it has appeared since: another process may be committing, always in this order.
            if not record.exists():
                raise DamagedData(
                    f"{record} is missing, though commits up to {last:06d} are there. {_NO_REMEDY}"
                ) from None
            continue
        parent = commits[-1].digest if commits else manifest.digest
        if commit.number != number or commit.parent != parent:
            raise DamagedData(f"{record} is of another run, or out of its place. {_NO_REMEDY}")
        commits.append(commit)


def _read_commit(path: Path) -> StepCommit:
    is_newest = not path.with_name(f"{int(path.stem) + 1:06d}.json").exists()
    # Nothing has been released on the strength of the newest commit: it may be redone.
    redo = "It is the newest commit: delete it, resume, and its step is redone with the same result"
    return StepCommit.read(path, redo if is_newest else _NO_REMEDY)


def _last_number(folder: Path) -> int:
    """The highest number of a commit in a folder, or -1. Raises DamagedData for what is no commit."""
    last = -1
    for path in _children(folder):
        if disk.LEFTOVER.match(path.name):
            continue
        if not re.fullmatch(r"[0-9]{6}\.json", path.name):
            raise DamagedData(f"{path} is no commit, and does not belong there: move it elsewhere")
        last = max(last, int(path.stem))
    return last


def _commit_path(run_path: Path, number: int) -> Path:
    return run_path / "commits" / f"{number:06d}.json"


def _superseded_by(path: Path) -> Superseded:
    return Superseded(
        f"another process is ahead of this one and has committed {path}: this one stops, and its work on that "
        "step is not used. The run is not damaged"
    )


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _is_free(path: Path) -> bool:
    """Whether a run may be made here: nothing is there, or what a crash while making one left behind."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    # A disk mounted for the run may have its own lost+found.
    return all(
        child.name == "lost+found" or ((match := disk.LEFTOVER.match(child.name)) and match["name"] == _MANIFEST)
        for child in path.iterdir()
    )


def _is_same(source: Path, shown: Path) -> bool:
    if not shown.is_file():
        return False
    return source.samefile(shown) or disk.hash_file(source) == disk.hash_file(shown)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        disk.remove_tree(path)
    else:
        disk.remove_file(path)
