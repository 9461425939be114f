"""The commit log: every record of a run, replayed as one unbroken chain, and the create-only append.

    commits/000007.json   written once each; the file names are the order

The state of a run is the fold over its contiguous records. A record appears whole, by one operation that only one
process can win. The newest record may be torn by a crash on a file system without hard links; nothing depends on it
yet, so its step can be done again.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable

from pipeline.errors import DamagedData, FileExists, FileGone, Superseded
from pipeline.rundir import filesystem
from pipeline.rundir.records import ENVIRONMENT, INVALIDATE, SETTINGS, Invalidation, StepCommit
from pipeline.rundir.storage.base import Storage

log = logging.getLogger(__name__)

# Seconds after which a record that is still damaged counts as torn: until then a process may be writing it.
_STILL_WRITING_S = 2.0
NO_REMEDY = "Put it back from a copy of the run directory, or start over in a new one; what it held cannot be rebuilt"


class CommitLog:
    """The records of one run: those found when it was opened, and those appended through this object."""

    def __init__(self, storage: Storage, run_digest: str, records: Iterable[StepCommit] = ()) -> None:
        """Start from known records.

        Args:
            storage: Where the run is stored.
            run_digest: Digest of run.json, the parent of record 0.
            records: Records that need not be read again.
        """
        self._storage, self._run_digest = storage, run_digest
        self.records = tuple(records)

    @classmethod
    def replay(cls, storage: Storage, run_digest: str, *, is_resuming: bool = False) -> CommitLog:
        """Read all records.

        Args:
            storage: Where the run is stored.
            run_digest: Digest of run.json.
            is_resuming: A torn newest record is renamed, and its step counts as not done.

        Raises:
            DamagedData: A record is torn, missing, or of another run.
            ConfigMismatch: A record was written by a newer version.
        """
        commits = cls(storage, run_digest)
        try:
            commits.refresh()
        except DamagedData:
            if not (is_resuming and _rename_torn_record(storage)):
                raise
            commits = cls(storage, run_digest)
            commits.refresh()
        return commits

    def refresh(self) -> None:
        """Read the records that other processes have appended since. Raises as `replay` does."""
        records = list(self.records)
        while True:
            number = len(records)
            key = commit_key(number)
            try:
                record = _read(self._storage, number)
            except FileGone:
                last = _last_number(self._storage)
                if last < number:
                    self.records = tuple(records)
                    return
                # Unless it has appeared since: another process may be committing, always in this order.
                if not self._storage.exists(key):
                    raise DamagedData(
                        f"{self._storage.label}/{key} is missing, though commits up to {last:06d} are there. "
                        f"{NO_REMEDY}"
                    ) from None
                continue
            parent = records[-1].digest if records else self._run_digest
            if record.number != number or record.parent != parent:
                raise DamagedData(f"{self._storage.label}/{key} is of another run, or out of its place. {NO_REMEDY}")
            records.append(record)

    def append(self, record: StepCommit) -> StepCommit:
        """Make the next record.

        Returns:
            The record as it is stored.

        Raises:
            Superseded: Another process has made a record of this number.
        """
        key = commit_key(record.number)
        try:
            self._storage.create(key, record.to_bytes())
        except FileGone:
            self.check_superseded()
            raise
        except FileExists:
            winner = _read(self._storage, record.number)
            if winner.attempt != record.attempt:
                raise self._superseded_by(key) from None
            # Ours, from a first try whose answer was lost.
            record = winner
        self.records = (*self.records, record)
        return record

    @property
    def in_force(self) -> tuple[StepCommit, ...]:
        """The commits of steps that no later record has invalidated."""
        commits: list[StepCommit] = []
        for record in self.records:
            if record.step == INVALIDATE:
                first = record.result_as(Invalidation).from_number
                commits = [commit for commit in commits if commit.number < first]
            elif record.step not in (ENVIRONMENT, SETTINGS):
                commits.append(record)
        return tuple(commits)

    @property
    def newest_digest(self) -> str:
        """The parent of the next record: the digest of the newest one, or of run.json."""
        return self.records[-1].digest if self.records else self._run_digest

    def next_attempt(self) -> str:
        """A new name for an attempt at the next record, unlike that of every other process."""
        return f"{len(self.records):06d}-{secrets.token_hex(4)}"

    def has_record_of(self, number: int, attempt: str) -> bool:
        """Whether the stored record of this number is, or may be, that of this attempt."""
        try:
            return _read(self._storage, number).attempt == attempt
        except FileGone:
            return False
        except DamagedData:
            return True

    def check_superseded(self) -> None:
        """Raise Superseded if another process has made the record that would be the next one here."""
        key = commit_key(len(self.records))
        if self._storage.exists(key):
            raise self._superseded_by(key)

    def _superseded_by(self, key: str) -> Superseded:
        return Superseded(
            f"another process is ahead of this one and has committed {self._storage.label}/{key}: this one stops, and "
            "its work on that step is not used. The run is not damaged"
        )


def commit_key(number: int) -> str:
    """Key of the record of this number."""
    return f"commits/{number:06d}.json"


def _read(storage: Storage, number: int) -> StepCommit:
    key = commit_key(number)
    data, shown = storage.read(key), f"{storage.label}/{key}"
    try:
        return StepCommit.from_bytes(data, shown, NO_REMEDY)
    except DamagedData:
        if storage.exists(commit_key(number + 1)):
            raise
        # Nothing has been released because of the newest commit: its step can be done again.
        redo = "It is the newest commit: `lampctl resume` does its step again, with the same result"
        return StepCommit.from_bytes(data, shown, redo)


def _last_number(storage: Storage) -> int:
    """The highest number of a record, or -1. Raises DamagedData for a file that is no record."""
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


def _rename_torn_record(storage: Storage) -> bool:
    """Rename the newest record if it is damaged and stays damaged. False if there is none."""
    number = _last_number(storage)
    key = commit_key(number)
    if number < 0:
        return False
    before = storage.read(key)
    try:
        StepCommit.from_bytes(before, key)
    except DamagedData as error:
        time.sleep(_STILL_WRITING_S)  # another process may be in the middle of writing it
        if storage.read(key) != before:
            return False
        log.warning("%s: it was set aside, and its step is done again", error)
        storage.set_record_aside(key)
        return True
    return False
