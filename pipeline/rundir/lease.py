"""Lease of a run: which process works on it. It avoids duplicate work; correctness never depends on it.

lease.json names the holder and counts its heartbeats. Another process is refused while the count rises. It takes the
lease over when the count has not changed for a minute of its own clock: clocks of two machines are never compared. A
holder that finds another name in the lease (it was frozen, or --takeover took the lease) stops at its next batch
boundary. If it did not, the commits would stop it, because only one process can make each of them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import DamagedData, DiskError, FileExists, FileGone, Occupied, Superseded
from pipeline.rundir.run_directory import RunDirectory

log = logging.getLogger(__name__)

_KEY = "lease.json"
BEAT_S = 15.0
STALE_S = 60.0


class _Holder(BaseModel):
    """Content of lease.json."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    token: str
    host: str
    boot: str  # distinguishes machines of one name, and a machine before and after a reboot
    pid: int
    process: str  # start time of the process as its system reports it: process numbers are reused
    since: str  # for people
    beat: int

    @property
    def shown(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since[:19].replace('T', ' ')}"


@dataclass(frozen=True)
class Timing:
    """Seconds between heartbeats, and seconds without one after which a lease is stale."""

    beat_s: float = BEAT_S
    stale_s: float = STALE_S


class Lease:
    """Context manager that holds a run. Entering raises Occupied if another process holds it."""

    def __init__(
        self,
        run: RunDirectory,
        on_loss: Callable[[Superseded], None],
        notify: Callable[[str], None],
        *,
        takeover: bool = False,
        timing: Timing | None = None,
    ) -> None:
        """Prepare to hold a run.

        Args:
            run: The run.
            on_loss: Called from another thread when another process has taken the lease.
            notify: Shows a message to the user.
            takeover: Take the lease although another process holds it.
            timing: Seconds between heartbeats and until a lease is stale; None: the defaults.
        """
        self._run, self._on_loss, self._notify, self._takeover = run, on_loss, notify, takeover
        self._timing = timing or Timing()
        host, boot, pid, process = _this_process()
        since = datetime.now(UTC).isoformat()
        self._own = _Holder(
            token=secrets.token_hex(8), host=host, boot=boot, pid=pid, process=process, since=since, beat=0
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if _holds(holder_of(self._run), self._own):
                self._run.storage.remove(_KEY)
        except DiskError as failure:
            log.warning("lease.json could not be removed, and will count as stale: %s", failure)

    def _acquire(self) -> None:
        while True:
            holder = holder_of(self._run)
            if holder is None:
                try:
                    self._run.storage.create(_KEY, _encode(self._own))
                    return
                except FileExists:
                    if holder_of(self._run) is not None:
                        continue  # another process was first; a lease that cannot be read has no holder
            elif not self._may_take_over(holder):
                continue
            self._run.storage.replace(_KEY, _encode(self._own))
            # If two processes do this at once, the later one holds the lease.
            if _holds(holder_of(self._run), self._own):
                return

    def _may_take_over(self, holder: _Holder) -> bool:
        """Whether the lease may be taken; False if its holder has changed meanwhile. Raises Occupied."""
        if self._takeover:
            self._notify(f"taking {self._run.label} over from {holder.shown}")
            return True
        if (holder.host, holder.boot) == (self._own.host, self._own.boot):
            if not _is_running(holder):
                return True
            if holder.process:
                raise self._occupied(holder)
        self._notify(
            f"{self._run.label} may be worked on by {holder.shown}: watching it for up to {self._timing.stale_s:g} s "
            "(--takeover takes it at once)"
        )
        deadline = time.monotonic() + self._timing.stale_s
        while time.monotonic() < deadline:
            if self._ended.wait(min(1.0, self._timing.stale_s / 20)):
                break
            now = holder_of(self._run)
            if now is None or now.token != holder.token:
                return False
            if now.beat != holder.beat:
                raise self._occupied(holder)
        self._notify(f"{holder.shown} has given no sign of life: taking its run over")
        return True

    def _occupied(self, holder: _Holder) -> Occupied:
        return Occupied(
            f"{self._run.label} is being worked on by {holder.shown}. Wait for it, stop it, or take the run over with "
            "`lampctl resume --takeover`; the other one then stops by itself"
        )

    def _beat(self) -> None:
        own = self._own
        while not self._ended.wait(self._timing.beat_s):
            try:
                holder = holder_of(self._run)
                if holder is not None and holder.token != own.token:
                    self._on_loss(
                        Superseded(
                            f"{holder.shown} has taken {self._run.label} over: this process stops, and what it has not "
                            "committed is not used"
                        )
                    )
                    return
                own = own.model_copy(update={"beat": own.beat + 1})
                self._run.storage.replace(_KEY, _encode(own))
            except (DiskError, DamagedData) as error:
                log.warning("lease.json could not be renewed: %s", error)


def holder_of(run: RunDirectory) -> _Holder | None:
    """The holder of a run, by its lease; None if there is none, or the lease cannot be read."""
    try:
        return _Holder.model_validate_json(run.storage.read(_KEY))
    except (FileGone, ValidationError, RecursionError):
        return None
    except DiskError as error:  # a link or a folder in its place
        log.warning("lease.json is passed over: %s", error)
        return None


def is_known_dead(holder: _Holder) -> bool:
    """Whether the holder was a process of this machine that has ended. False for a process of another machine."""
    host, boot, _, _ = _this_process()
    return (holder.host, holder.boot) == (host, boot) and not _is_running(holder)


def _holds(holder: _Holder | None, own: _Holder) -> bool:
    return holder is not None and holder.token == own.token


def _encode(holder: _Holder) -> bytes:
    return (json.dumps(holder.model_dump()) + "\n").encode()


def _this_process() -> tuple[str, str, int, str]:
    pid = os.getpid()
    return socket.gethostname(), _boot(), pid, _began(pid)


def _boot() -> str:
    # In a container, the namespace of its processes: pids of another one mean nothing here.
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _began(pid: int) -> str:
    """The start time of a process in clock ticks since boot; "" where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name in brackets may hold anything, spaces and brackets too.
    return stat.rpartition(")")[2].split()[19]


def _is_running(holder: _Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    began = _began(holder.pid)
    return not began or not holder.process or began == holder.process
