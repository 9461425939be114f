"""The run directory: what has been done, stored so that only losing the disk can undo it.

    run.json              written once: what this run is
    commits/000007.json   written once each: a step is done; the file names are the order
    data/<attempt>/       what a commit points at, or what an attempt left that was never committed
    model/                a view of the exported model: hard links into data/
    events.jsonl          for people; losing it loses nothing

The state of a run is the fold over its contiguous commits, and nothing else. A step's files are durable before its
commit appears, and the commit appears whole, in one operation that only one process can win.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DamagedData, DiskError, FileExists, FileGone, NotARun, RunNotFound, StepOrderError
from pipeline.rundir import filesystem, views
from pipeline.rundir.commit_log import NO_REMEDY, CommitLog, commit_key
from pipeline.rundir.filesystem import FileDigest
from pipeline.rundir.records import (
    ENVIRONMENT,
    INVALIDATE,
    SETTINGS,
    EnvironmentChange,
    Invalidation,
    JsonObject,
    Payload,
    Result,
    RunManifest,
    StepCommit,
    finite_or_null,
)
from pipeline.rundir.redact import scrub, scrub_values
from pipeline.rundir.step_transaction import Attempt
from pipeline.rundir.storage.base import Storage
from pipeline.rundir.storage.local import FolderStorage
from pipeline.rundir.storage.locate import Place, locate

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.rundir.activation_store import ActivationStream

log = logging.getLogger(__name__)

_MANIFEST = "run.json"
_PROGRESS = "progress"
_ATTEMPT = re.compile(r"^([0-9]{6})-[0-9a-f]{8}$")
_REPAIR = "`lampctl resume` makes it again"


@dataclass(frozen=True)
class StepReport:
    """What a commit records beside the payloads.

    Attributes:
        result: Result of the step.
        runtime: The runtime settings in force.
        started_at: When the step began.
        elapsed_s: Seconds of work, those of interrupted attempts included.
        peak_memory_bytes: Peak memory of the process.
        peak_device_bytes: Peak memory of the GPU.
    """

    result: Result
    runtime: Mapping[str, JsonValue]
    started_at: datetime
    elapsed_s: float
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None


class RunDirectory:
    """A run as it was when it was opened, plus what was committed through this object."""

    def __init__(self, storage: Storage, manifest: RunManifest, commit_log: CommitLog) -> None:
        self.storage = storage
        self.label = storage.label
        self.manifest = manifest
        self._commits = commit_log
        self._checked: set[str] = set()
        self._released: set[str] = set()

    @classmethod
    def create(cls, place: Place, manifest: RunManifest) -> RunDirectory:
        """Create a run at `place`, which must be missing or empty.

        Raises:
            NotARun: The folder holds something else.
            FileExists: There is a run already.
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
        return cls(storage, manifest, CommitLog(storage, manifest.digest))

    @staticmethod
    def is_at(storage: Storage) -> bool:
        """Whether a run is stored there, sound or not."""
        return storage.exists(_MANIFEST)

    @classmethod
    def open(cls, place: Place, *, is_resuming: bool = False) -> RunDirectory:
        """Open the run at `place` and replay its commits.

        Args:
            place: Folder, address or storage.
            is_resuming: The newest record may be torn, as a crash leaves it on a file system without hard links. It
                is renamed, and its step counts as not done.

        Raises:
            RunNotFound: There is nothing.
            NotARun: There is something else.
            DamagedData: A record is torn, foreign or missing.
            ConfigMismatch: The run was written by a newer version.
        """
        storage = locate(place)
        if isinstance(storage, FolderStorage) and storage.folder.exists() and not storage.folder.is_dir():
            raise NotARun(f"{storage.label} is no folder")
        shown = f"{storage.label}/{_MANIFEST}"
        try:
            manifest = RunManifest.from_bytes(storage.read(_MANIFEST), shown, NO_REMEDY)
        except FileGone:
            if storage.is_free():
                raise RunNotFound(f"there is no run at {storage.label}: {shown} is missing") from None
            if storage.exists(_MANIFEST):  # made by another process a moment ago
                return cls.open(storage, is_resuming=is_resuming)
            hint = "; of a sweep: lampctl sweep status" if storage.exists("sweep.json") else ""
            raise NotARun(f"{storage.label} is no run directory: it has no {_MANIFEST}{hint}") from None
        return cls(storage, manifest, CommitLog.replay(storage, manifest.digest, is_resuming=is_resuming))

    def refresh(self) -> None:
        """Read what other processes have committed since. Raises as `open` does."""
        self._commits.refresh()

    @property
    def path(self) -> Path:
        """The local folder that new payloads are written under: the run directory itself, if it is local."""
        return self.storage.folder

    @property
    def log(self) -> tuple[StepCommit, ...]:
        """Every record, those that were invalidated included."""
        return self._commits.records

    @property
    def commits(self) -> tuple[StepCommit, ...]:
        """The commits in force, in order."""
        return self._commits.in_force

    def commit_for(self, step: str) -> StepCommit | None:
        """The commit of a step, by its name; None if it has not been done."""
        return next((commit for commit in self.commits if commit.step == step), None)

    def made(self, names: Iterable[str]) -> list[str]:
        """Those of the payload names that a commit has. A step taken over from another run may have made fewer."""
        there = {name for commit in self.commits for name in commit.payloads}
        return [name for name in names if name in there]

    def payload(self, name: str) -> Payload:
        """The payload of that name, of the newest commit that made one. Raises StepOrderError."""
        return self.find(name)[1]

    def find(self, name: str) -> tuple[StepCommit, Payload]:
        """The newest commit in force that made the payload of that name, and the payload. Raises StepOrderError."""
        for commit in reversed(self.commits):
            if name in commit.payloads:
                return commit, commit.payloads[name]
        raise StepOrderError(f"no step of {self.label} has made {name} yet")

    def begin(self, step: str) -> Attempt:
        """Start an attempt at `step`, which will be the next commit. Raises StepOrderError if it is done."""
        if self.commit_for(step) is not None:
            raise StepOrderError(f"{step} is already done in {self.label}")
        return self.begin_again(step)

    def begin_again(self, step: str) -> Attempt:
        """Start an attempt at a step that may be done, to make its payloads again."""
        folder = self.storage.new_folder(f"data/{self._commits.next_attempt()}", with_parents=True)
        return Attempt(self.storage, step, folder, len(self.log), self.check_superseded)

    def commit(self, attempt: Attempt, report: StepReport) -> StepCommit:
        """Commit the attempt's step. When this returns, no crash can undo it.

        Raises:
            Superseded: Another process has committed this step.
            DamagedData: A payload is incomplete.
            StepOrderError: The attempt is not for the next commit.
        """
        number = len(self.log)
        if attempt.number != number:
            raise StepOrderError(f"{attempt.id} was begun as commit {attempt.number}, the next one is {number}")
        commit = self._record(attempt.step, attempt.id, report, attempt.seal())
        try:
            self.storage.keep(f"data/{attempt.id}")
        except FileGone:
            self.check_superseded()
            raise
        return self._commits.append(commit)

    def abandon(self, attempt: Attempt) -> None:
        """Delete what an attempt has written if it was not committed, so that failures do not fill the disk."""
        try:
            # Its record may be there, though making it ended in an error.
            if not self._commits.has_record_of(attempt.number, attempt.id):
                self.storage.remove(f"data/{attempt.id}")
            if self.storage.exists(commit_key(attempt.number)):
                self.storage.remove(self.progress_folder)  # of a step that is done
        except DiskError as error:
            log.warning("an attempt that failed is left to `lampctl gc`: %s", error)

    def invalidate(self, number: int, reason: str, runtime: Mapping[str, JsonValue]) -> StepCommit:
        """Record that the commits from `number` on are invalid: their steps are to be done again.

        Used for a payload that is damaged and cannot be rebuilt bit for bit. Raises Superseded.
        """
        return self._note(INVALIDATE, Invalidation(from_number=number, reason=scrub(reason)), runtime)

    @property
    def environment(self) -> JsonObject:
        """Versions and device for the next step: those of the beginning, unless they have changed."""
        changes = [record for record in self.log if record.step == ENVIRONMENT]
        return changes[-1].result_as(EnvironmentChange).environment if changes else self.manifest.environment

    def change_environment(
        self, environment: Mapping[str, JsonValue], changes: Sequence[str], runtime: Mapping[str, JsonValue]
    ) -> StepCommit:
        """Record that another machine, or other versions, do the steps from here on. Raises Superseded."""
        return self._note(
            ENVIRONMENT, EnvironmentChange(environment=dict(environment), changes=tuple(changes)), runtime
        )

    def change_settings(self, runtime: Mapping[str, JsonValue]) -> StepCommit:
        """Record other runtime settings, from here on, where no step does so. Raises Superseded."""
        return self._note(SETTINGS, Result(), runtime)

    def _note(self, kind: str, result: Result, runtime: Mapping[str, JsonValue]) -> StepCommit:
        """Append a record that is no step."""
        report = StepReport(result, runtime, datetime.now(UTC), 0.0)
        return self._commits.append(self._record(kind, self._commits.next_attempt(), report, {}))

    def _record(self, step: str, attempt: str, report: StepReport, payloads: Mapping[str, Payload]) -> StepCommit:
        return StepCommit.new(
            number=len(self.log),
            step=step,
            parent=self.newest_digest,
            attempt=attempt,
            payloads=dict(payloads),
            result=report.result.model_dump(mode="json"),
            free=dict(report.runtime),
            started_at=report.started_at,
            elapsed_s=report.elapsed_s,
            peak_memory_bytes=report.peak_memory_bytes,
            peak_device_bytes=report.peak_device_bytes,
        )

    @property
    def newest_digest(self) -> str:
        """The parent of the next record: the digest of the newest one, or of run.json."""
        return self._commits.newest_digest

    @property
    def progress_folder(self) -> str:
        """Key of the folder for checkpoints of the next step (`pipeline.rundir.step_checkpoints`)."""
        return f"{_PROGRESS}/{len(self.log):06d}"

    def check_superseded(self) -> None:
        """Raise Superseded if another process has made the commit that would be next here."""
        self._commits.check_superseded()

    def open_stream(self, name: str) -> ActivationStream:
        """Open a committed activation stream; each file is checked when it is first read.

        Raises:
            StepOrderError: No step has made it yet.
            MissingChunk, DamagedData: It is not whole.
            Superseded: Another process is ahead.
        """
        from pipeline.rundir.activation_store import open_stream

        commit, payload = self.find(name)
        origin = f"{name} of {commit.step}"
        return open_stream(self.storage, payload, origin, self.check_superseded, self._checked)

    def open_file(self, name: str, filename: str | None = None) -> Path:
        """Path of a committed file, checked once against its sha256.

        Args:
            name: Name of the payload.
            filename: Which file of a payload of several, relative to its root.

        Raises:
            StepOrderError: No step has made it yet.
            DamagedData: It is missing, or not what was committed.
            Superseded: Another process is ahead.
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
        """Check every file again when it is next read."""
        self._checked.clear()
        self._released.clear()

    def is_released(self, name: str) -> bool:
        """Whether all files of the payload are deleted."""
        return not self.storage.exists(self.payload(name).root)

    def release(self, names: Iterable[str]) -> None:
        """Delete the files of payloads that no later step reads. A released payload is ignored."""
        for name in names:
            root = self.payload(name).root
            # Asked once for each: in a bucket every question is a request.
            if root not in self._released and self.storage.exists(root):
                self.storage.remove(root)
            self._released.add(root)

    def clean(self) -> None:
        """Delete what crashes have left: attempts that were never committed, temporaries, scratch.

        An attempt at a step that is not committed yet is kept, because another process may still commit it; so are
        temporaries of a later commit.
        """
        for key in self.leftovers():
            self.storage.remove(key)
        settled = [_MANIFEST, *(commit_key(commit.number) for commit in self.log)]
        self.storage.tidy(settled, [f"data/{commit.attempt}" for commit in self.commits])

    def leftovers(self) -> list[str]:
        """Keys of attempts that no commit in force names and that can no longer be committed.

        Checkpoints of steps that are done are listed, too.
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
        """Show a committed payload as the folder `target` (`pipeline.rundir.views`)."""
        return views.publish(self.storage, self.payload(name), target)

    def is_published(self, name: str, target: str = "model") -> bool:
        """Whether the folder `target` shows the whole payload."""
        return views.is_published(self.storage, self.payload(name), target)

    def write_view(self, path: str, contents: bytes) -> None:
        """Write or replace a file that no commit records, such as model/README.md."""
        views.write_view(self.storage, path, contents)

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl."""
        line = {"at": datetime.now(UTC).isoformat(), "kind": kind, **scrub_values(finite_or_null(fields))}
        try:
            self.storage.append("events.jsonl", json.dumps(line))
        except DiskError as error:
            # A lost line loses nothing, and a full disk shows in what counts.
            log.warning("events.jsonl is not written: %s", error)


def find_runs(root: Path) -> list[Path]:
    """The run directories directly under `root`, the one begun last first."""
    begun = [(path.stat().st_mtime_ns, path.parent) for path in Path(root).glob(f"*/{_MANIFEST}")]
    return [path for _, path in sorted(begun, reverse=True)]
