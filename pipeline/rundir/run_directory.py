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
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import FileDigest
from pipeline.rundir.records import (
    ENVIRONMENT,
    INVALIDATE,
    Payload,
    PayloadFile,
    RunManifest,
    StepCommit,
    finite_or_null,
    relative_path,
)
from pipeline.rundir.redact import scrub, scrub_values
from pipeline.rundir.step_transaction import Attempt, PayloadFolder
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.local import FolderStorage
from pipeline.rundir.storage.locate import Place, locate

if TYPE_CHECKING:
    from pipeline.rundir.activation_store import ActivationStream

__all__ = ["Attempt", "PayloadFolder", "RunDirectory", "find_runs"]

log = logging.getLogger(__name__)

_MANIFEST = "run.json"
_PROGRESS = "progress"
_NOT_VIEWS = {_MANIFEST, "commits", "data", _PROGRESS, "lease.json", "events.jsonl"}
_ATTEMPT = re.compile(r"^([0-9]{6})-[0-9a-f]{8}$")
_REPAIR = "`lampctl resume` makes it again"
_STILL_WRITING_S = 2.0
_NO_REMEDY = "Put it back from a copy of the run directory, or start over in a new one; what it held cannot be rebuilt"


class RunDirectory:
    """A run as it was when it was opened plus what was committed through this object.

    `commits` are those in force; `log` is every record, with those that were invalidated and the records that did it.
    """

    def __init__(self, storage: Storage, manifest: RunManifest, log: tuple[StepCommit, ...]) -> None:
        self.storage = storage
        self.label = storage.label
        self.manifest = manifest
        self.log = log
        self._checked: set[str] = set()
        self._released: set[str] = set()

    @classmethod
    def create(cls, place: Place, manifest: RunManifest) -> RunDirectory:
        """A new run at `place`, which must be missing or empty.

        Raises NotARun for a folder that holds something else; FileExists if there is a run already.
        """
        storage = locate(place)
        if storage.exists(_MANIFEST):
            raise FileExists(f"{storage.label} holds a run already")
        storage.prepare()
        if not storage.is_free():
            if storage.exists(_MANIFEST):
                raise FileExists(f"{storage.label} holds a run already")  # another process was first
            raise NotARun(
                f"{storage.label} is not empty and holds no run: nothing was written there. "
                "Name a new folder by --run-dir"
            )
        storage.create(_MANIFEST, manifest.to_bytes())
        return cls(storage, manifest, ())

    @staticmethod
    def is_at(storage: Storage) -> bool:
        """Whether a run lies there, sound or not."""
        return storage.exists(_MANIFEST)

    @classmethod
    def open(cls, place: Place, *, to_go_on: bool = False) -> RunDirectory:
        """The run at `place`, replayed from its commits.

        to_go_on: the newest record may be torn, as a crash leaves it on a file system without hard links: it is set
        aside, and its step counts as not done.
        Raises RunNotFound; NotARun; DamagedData naming the record that is torn, foreign or missing;
        ConfigMismatch if it was written by a newer version.
        """
        storage = locate(place)
        if isinstance(storage, FolderStorage) and storage.folder.exists() and not storage.folder.is_dir():
            raise NotARun(f"{storage.label} is no folder")
        shown = f"{storage.label}/{_MANIFEST}"
        try:
            manifest = RunManifest.from_bytes(storage.read(_MANIFEST), shown, _NO_REMEDY)
        except FileGone:
            if storage.is_free():
                raise RunNotFound(f"there is no run at {storage.label}: {shown} is missing") from None
            if storage.exists(_MANIFEST):  # made by another process a moment ago
                return cls.open(storage, to_go_on=to_go_on)
            hint = "; of a sweep: lampctl sweep status" if storage.exists("sweep.json") else ""
            raise NotARun(f"{storage.label} is no run directory: it has no {_MANIFEST}{hint}") from None
        try:
            return cls(storage, manifest, _replay(storage, manifest))
        except DamagedData:
            if not (to_go_on and _set_torn_record_aside(storage)):
                raise
            return cls(storage, manifest, _replay(storage, manifest))

    def refresh(self) -> None:
        """Take in what other processes have committed since. Raises as `open` does."""
        self.log = _replay(self.storage, self.manifest, self.log)

    @property
    def path(self) -> Path:
        """The folder on this machine that new payloads are written under: the run directory itself, if it is local."""
        return self.storage.folder

    @property
    def commits(self) -> tuple[StepCommit, ...]:
        """The commits in force, in order."""
        return in_force(self.log)

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
        return self.find(name)[1]

    def begin(self, step: str) -> Attempt:
        """A fresh attempt at `step`, which will be the next commit. Raises StepOrderError if it is done."""
        if self.commit_for(step) is not None:
            raise StepOrderError(f"{step} is already done in {self.label}")
        return self.begin_again(step)

    def begin_again(self, step: str) -> Attempt:
        """A fresh attempt at a step that may be done, to make its payloads once more."""
        number = len(self.log)
        key = f"data/{_attempt_name(number)}"
        return Attempt(self, number, step, self.storage.new_folder(key, with_parents=True))

    def commit(
        self,
        attempt: Attempt,
        *,
        figures: Mapping[str, Any],
        free: Mapping[str, Any],
        started_at: datetime,
        elapsed_s: float,
        peak_memory_bytes: int | None = None,
        peak_device_bytes: int | None = None,
    ) -> StepCommit:
        """Make the attempt's step done, for good: when this returns, no crash can undo it.

        Raises Superseded if another process has committed this step; DamagedData if a payload is incomplete;
        StepOrderError if the attempt is not for the next commit.
        """
        number = len(self.log)
        if attempt.number != number:
            raise StepOrderError(f"{attempt.id} was begun as commit {attempt.number}, the next one is {number}")
        commit = StepCommit.new(
            number=number,
            step=attempt.step,
            parent=self.newest_digest,
            attempt=attempt.id,
            payloads=attempt.seal(),
            figures=dict(figures),
            free=dict(free),
            started_at=started_at,
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
            peak_device_bytes=peak_device_bytes,
        )
        try:
            self.storage.keep(f"data/{attempt.id}")
        except FileGone:
            self.check_superseded()
            raise
        return self._append(commit)

    def abandon(self, attempt: Attempt) -> None:
        """Delete what an attempt has written that will not be committed, so that failures do not fill the disk."""
        try:
            # Its record may be there, though making it ended in an error.
            if not self._is_committed(attempt):
                self.storage.remove(f"data/{attempt.id}")
            if self.storage.exists(_commit_key(attempt.number)):
                self.storage.remove(self.progress_folder)  # of a step that is done
        except DiskError as error:
            log.warning("an attempt that failed is left to `lampctl gc`: %s", error)

    def _is_committed(self, attempt: Attempt) -> bool:
        try:
            return _read_commit(self.storage, attempt.number).attempt == attempt.id
        except FileGone:
            return False
        except DamagedData:
            return True  # for all that can be seen

    def invalidate(self, number: int, reason: str, free: Mapping[str, Any]) -> StepCommit:
        """Take the commits from `number` on out of force, by a commit of its own: their steps are to be done again.

        For a payload that is damaged and cannot be made again bit for bit. Raises Superseded.
        """
        return self._note(INVALIDATE, {"from_number": number, "reason": scrub(reason)}, free)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and device that the next step is to be done with: those of the beginning, unless they changed."""
        changes = [record for record in self.log if record.step == ENVIRONMENT]
        found: dict[str, Any] = changes[-1].figures["environment"] if changes else self.manifest.environment
        return found

    def change_environment(
        self, environment: Mapping[str, Any], changes: Sequence[str], free: Mapping[str, Any]
    ) -> StepCommit:
        """Write into the chain that from here on another machine, or other versions, do the work. Raises Superseded."""
        return self._note(ENVIRONMENT, {"environment": dict(environment), "changes": list(changes)}, free)

    def _note(self, kind: str, figures: Mapping[str, Any], free: Mapping[str, Any]) -> StepCommit:
        """A record that is no step."""
        return self._append(
            StepCommit.new(
                number=len(self.log),
                step=kind,
                parent=self.newest_digest,
                attempt=_attempt_name(len(self.log)),
                payloads={},
                figures=dict(figures),
                free=dict(free),
                started_at=datetime.now(UTC),
                elapsed_s=0.0,
            )
        )

    @property
    def newest_digest(self) -> str:
        """What the next record builds on: the digest of the newest one, or of run.json."""
        return self.log[-1].digest if self.log else self.manifest.digest

    @property
    def progress_folder(self) -> str:
        """Where records of how far the next step is are kept (`pipeline.rundir.step_checkpoints`), as a key."""
        return f"{_PROGRESS}/{len(self.log):06d}"

    def _append(self, commit: StepCommit) -> StepCommit:
        """Make the next record, unless another process has made one of that number."""
        key = _commit_key(commit.number)
        try:
            self.storage.create(key, commit.to_bytes())
        except FileGone:
            self.check_superseded()
            raise
        except FileExists:
            winner = _read_commit(self.storage, commit.number)
            if winner.attempt != commit.attempt:
                raise self._superseded_by(key) from None
            # Ours, from a first try whose answer was lost.
            commit = winner
        self.log = (*self.log, commit)
        return commit

    def open_stream(self, name: str) -> ActivationStream:
        """A committed activation stream, to read; each file is checked when it is first read.

        Raises StepOrderError; MissingChunk or DamagedData; Superseded if another process is ahead.
        """
        from pipeline.rundir.activation_store import open_stream

        commit, payload = self.find(name)
        origin = f"{name} of {commit.step}"
        return open_stream(self.storage, payload, origin, self.check_superseded, self._checked)

    def open_file(self, name: str, filename: str | None = None) -> Path:
        """The path of a committed file, checked once against its sha256.

        filename: which file, for a payload of several, relative to its root.
        Raises StepOrderError; DamagedData; Superseded if another process is ahead.
        """
        commit, payload = self.find(name)
        file = payload.files[0] if filename is None else payload.file(filename)
        shown = f"{self.label}/{file.path} ({name} of {commit.step})"
        try:
            path = self.storage.local(file.path)
            if file.path in self._checked:
                return path
            found = filesystem.hash_file(path)
            if found != FileDigest(file.size, file.sha256) and self.storage.drop_copy(file.path):
                path = self.storage.local(file.path)
                found = filesystem.hash_file(path)
        except FileGone:
            self.check_superseded()
            raise DamagedData(f"{shown} is missing. {_REPAIR}") from None
        if found != FileDigest(file.size, file.sha256):
            raise DamagedData(
                f"{shown} is damaged: its sha256 is not the committed one. Nothing was computed with it. {_REPAIR}"
            )
        self._checked.add(file.path)
        return path

    def forget_checks(self) -> None:
        """Check every file anew when it is next read."""
        self._checked.clear()
        self._released.clear()

    def is_released(self, name: str) -> bool:
        """Whether the payload's files are gone, all of them."""
        return not self.storage.exists(self.payload(name).root)

    def release(self, names: Iterable[str]) -> None:
        """Delete the files of payloads that nobody will read again. Released already is fine."""
        for name in names:
            root = self.payload(name).root
            # Asked once for each: in a bucket every question is a request.
            if root not in self._released and self.storage.exists(root):
                self.storage.remove(root)
            self._released.add(root)

    def clean(self) -> None:
        """Delete what crashes have left: attempts that came to nothing, temporaries, scratch.

        An attempt at a step that is not committed yet is left alone, since whoever works on it may still
        commit it; and so are temporaries of a commit to come.
        """
        for key in self.leftovers():
            self.storage.remove(key)
        settled = [_MANIFEST, *(_commit_key(commit.number) for commit in self.log)]
        self.storage.tidy(settled, [f"data/{commit.attempt}" for commit in self.commits])

    def leftovers(self) -> list[str]:
        """The attempts that no commit in force names and that nobody can commit any more, as keys.

        And the progress records of steps that are done.
        """
        kept = {commit.attempt for commit in self.commits}
        found = []
        for name in self.storage.names("data"):
            match = _ATTEMPT.match(name)
            if match and int(match[1]) < len(self.log) and name not in kept:
                found.append(f"data/{name}")
        for name in self.storage.names(_PROGRESS):
            if re.fullmatch(r"[0-9]{6}", name) and int(name) < len(self.log):
                found.append(f"{_PROGRESS}/{name}")
        return found

    def publish(self, name: str, target: str = "model") -> Path:
        """The folder `target` in the run directory, showing a committed payload by hard links.

        It appears complete or not at all; one that shows this payload already is left as it is, another one
        is replaced.
        """
        return self.storage.publish(_require_view(target, is_folder=True), self._sources(name))

    def is_published(self, name: str, target: str = "model") -> bool:
        """Whether the folder `target` shows all of a committed payload."""
        return self.storage.is_published(_require_view(target, is_folder=True), self._sources(name))

    def write_view(self, path: str, contents: bytes) -> None:
        """Write or replace a file that no commit vouches for, such as model/README.md."""
        self.storage.replace(_require_view(path), contents)

    def _sources(self, name: str) -> dict[str, PayloadFile]:
        payload = self.payload(name)
        return {payload.inner(file): file for file in payload.files}

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl."""
        line = {"at": datetime.now(UTC).isoformat(), "kind": kind, **scrub_values(finite_or_null(fields))}
        try:
            self.storage.append("events.jsonl", json.dumps(line))
        except DiskError as error:
            # Losing a line loses nothing, and a disk that is full will be noticed by what counts.
            log.warning("events.jsonl is not written: %s", error)

    def check_superseded(self) -> None:
        """Raise Superseded if another process has made the commit that would be next here."""
        key = _commit_key(len(self.log))
        if self.storage.exists(key):
            raise self._superseded_by(key)

    def find(self, name: str) -> tuple[StepCommit, Payload]:
        """The newest commit in force that made the payload of that name, and the payload. Raises StepOrderError."""
        for commit in reversed(self.commits):
            if name in commit.payloads:
                return commit, commit.payloads[name]
        raise StepOrderError(f"no step of {self.label} has made {name} yet")

    def _superseded_by(self, key: str) -> Superseded:
        return Superseded(
            f"another process is ahead of this one and has committed {self.label}/{key}: this one stops, and its "
            "work on that step is not used. The run is not damaged"
        )


def find_runs(root: Path) -> list[Path]:
    """The run directories right under `root`, the one begun last first."""
    begun = [(path.stat().st_mtime_ns, path.parent) for path in Path(root).glob(f"*/{_MANIFEST}")]
    return [path for _, path in sorted(begun, reverse=True)]


def in_force(records: Iterable[StepCommit]) -> tuple[StepCommit, ...]:
    """The fold over all records: the commits that none after them has taken out of force."""
    commits: list[StepCommit] = []
    for record in records:
        if record.step == INVALIDATE:
            commits = [commit for commit in commits if commit.number < record.figures["from_number"]]
        elif record.step != ENVIRONMENT:
            commits.append(record)
    return tuple(commits)


def _attempt_name(number: int) -> str:
    return f"{number:06d}-{secrets.token_hex(4)}"


def _replay(storage: Storage, manifest: RunManifest, known: Sequence[StepCommit] = ()) -> tuple[StepCommit, ...]:
    """All records from number 0 up, checked to be one unbroken chain that starts at this run.json.

    known: those that need not be read again.
    """
    commits: list[StepCommit] = list(known)
    while True:
        number = len(commits)
        key = _commit_key(number)
        try:
            commit = _read_commit(storage, number)
        except FileGone:
            last = _last_number(storage)
            if last < number:
                return tuple(commits)
            # Unless it has appeared since: another process may be committing, always in this order.
            if not storage.exists(key):
                raise DamagedData(
                    f"{storage.label}/{key} is missing, though commits up to {last:06d} are there. {_NO_REMEDY}"
                ) from None
            continue
        parent = commits[-1].digest if commits else manifest.digest
        if commit.number != number or commit.parent != parent:
            raise DamagedData(f"{storage.label}/{key} is of another run, or out of its place. {_NO_REMEDY}")
        commits.append(commit)


def _read_commit(storage: Storage, number: int) -> StepCommit:
    key = _commit_key(number)
    data, shown = storage.read(key), f"{storage.label}/{key}"
    try:
        return StepCommit.from_bytes(data, shown, _NO_REMEDY)
    except DamagedData:
        if storage.exists(_commit_key(number + 1)):
            raise
        # Nothing has been released on the strength of the newest commit: it may be redone.
        redo = "It is the newest commit: `lampctl resume` does its step again, with the same result"
        return StepCommit.from_bytes(data, shown, redo)


def _last_number(storage: Storage) -> int:
    """The highest number of a commit, or -1. Raises DamagedData for what is no commit."""
    last = -1
    for name in storage.names("commits"):
        if filesystem.LEFTOVER.match(name):
            continue
        if not re.fullmatch(r"[0-9]{6}\.json", name):
            raise DamagedData(
                f"{storage.label}/commits/{name} is no commit, and does not belong there: move it elsewhere"
            )
        last = max(last, int(name.removesuffix(".json")))
    return last


def _set_torn_record_aside(storage: Storage) -> bool:
    """Take the newest record out of the way, if it is damaged and stays so: nothing was built on it."""
    number = _last_number(storage)
    key = _commit_key(number)
    if number < 0:
        return False
    before = storage.read(key)
    try:
        StepCommit.from_bytes(before, key)
    except DamagedData as error:
        time.sleep(_STILL_WRITING_S)  # somebody may be in the middle of writing it
        if storage.read(key) != before:
            return False
        log.warning("%s: it was set aside, and its step is done again", error)
        storage.set_record_aside(key)
        return True
    return False


def _commit_key(number: int) -> str:
    return f"commits/{number:06d}.json"


def _require_view(path: str, *, is_folder: bool = False) -> str:
    if is_folder and "/" in path:
        raise ValueError(f"{path} is no name of a folder in the run directory")
    if relative_path(path).split("/")[0] in _NOT_VIEWS or path.startswith("."):
        raise ValueError(f"{path} is no place for a view")
    return path
