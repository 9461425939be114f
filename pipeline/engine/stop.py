"""Request to stop a run: set by a signal or a clock, obeyed at the next batch boundary."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from pipeline.errors import Interrupted, PipelineError, Preempted, Superseded

# After a signal: seconds to wait for the next batch boundary before the process ends, and seconds in all while a
# checkpoint is being written. Batch systems kill after 10 to 30 seconds.
_GRACE_S, _GRACE_SAVING_S = 4.0, 25.0


@dataclass
class StopRequest:
    """A request to stop, set from a signal handler or another thread and read at batch boundaries.

    A second signal stops the process at once.

    Attributes:
        end_process: Called when no batch boundary comes within `grace_s` seconds. It ends the process with the exit
            code of the error. The step loses its work since the last checkpoint; commits are safe at any time.
        grace_s: Seconds to wait for a batch boundary.
        reason: The error to raise at the next batch boundary; None: nothing was requested.
    """

    end_process: Callable[[PipelineError], None]
    grace_s: float = _GRACE_S
    reason: PipelineError | None = None
    _waiting: PipelineError | None = None  # a reason that waits until this process has advanced
    _has_advanced: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)
    _is_saving: bool = False
    _has_signal: bool = False
    _has_ended: bool = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._has_signal:
            raise self._error(number)
        self._has_signal = True
        self.request(self._error(number))

    def request(self, reason: PipelineError) -> None:
        """Request a stop at the next batch boundary. May be called from any thread; the first reason wins."""
        if self.reason is None:
            self.reason = reason
            threading.Thread(target=self._end_in_time, name="grace", daemon=True).start()

    def request_once_advanced(self, reason: PipelineError) -> None:
        """Request a stop, but not before this process has advanced: a limit that is too short for that would stop
        every process at the same place. May be called from any thread.
        """
        self._waiting = reason
        if self._has_advanced:
            self.request(reason)

    def advanced(self) -> None:
        """Note that a step was committed, or a checkpoint saved that is further than what this process began with."""
        self._has_advanced = True
        if self._waiting is not None:
            self.request(self._waiting)

    @property
    def awaits_advance(self) -> bool:
        """Whether a stop is requested for the moment when this process has advanced."""
        return self._waiting is not None and not self._has_advanced

    @property
    def is_requested(self) -> bool:
        """Whether the work should stop at the next batch boundary."""
        return self.reason is not None

    @property
    def keeps_progress(self) -> bool:
        """Whether a checkpoint is worth saving before the stop. A superseded process has nothing to resume."""
        return not isinstance(self.reason, Superseded)

    def check(self) -> None:
        """Raise the reason to stop, if there is one."""
        if self.reason is not None:
            raise self.reason

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Extend the grace period while a checkpoint is being written."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def _end_in_time(self) -> None:
        start = time.monotonic()
        time.sleep(self.grace_s)
        while self._is_saving and time.monotonic() - start < _GRACE_SAVING_S:
            time.sleep(0.05)
        if self._has_ended:
            return  # the process is stopping already
        assert self.reason is not None
        self.end_process(self.reason)

    @staticmethod
    def _error(number: int) -> Preempted | Interrupted:
        kind = Interrupted if number == signal.SIGINT else Preempted
        return kind(
            f"stopped by {signal.Signals(number).name}; what is committed is safe; `lampctl resume`, or the "
            "same command again, resumes the run"
        )
