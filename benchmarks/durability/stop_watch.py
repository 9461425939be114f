"""A stop watch around the functions that make a run durable, and `lampctl` run in this process."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


class StopWatch:
    """Seconds by kind; what one timed function spends in another counts for the inner one alone."""

    def __init__(self, *, main_only: bool = False) -> None:
        """main_only: what other threads do is not counted."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._main_only = main_only
        self._lock = threading.Lock()
        self._inner = threading.local()

    @contextlib.contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        if self._main_only and threading.current_thread() is not threading.main_thread():
            yield
            return
        outer_inner = getattr(self._inner, "seconds", 0.0)
        self._inner.seconds = 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            with self._lock:
                self.seconds[kind] += elapsed - self._inner.seconds
            self._inner.seconds = outer_inner + elapsed

    def around(self, owner: Any, name: str, kind: str) -> None:
        """Time every call of `owner.name`."""
        function: Callable = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(kind):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def run_lampctl(arguments: list[str]) -> None:
    """The command line in this process. Raises SystemExit if it fails."""
    from lampctl import app

    sys.argv = ["lampctl", *arguments]
    try:
        app.main()
    except SystemExit as end:
        if end.code:
            raise


def watch_durability(watch: StopWatch) -> None:
    """Have everything that makes a run durable timed."""
    from pipeline.engine import repair
    from pipeline.rundir import filesystem, run_directory

    class Hash:
        """hashlib.sha256, timed."""

        def __init__(self, data: Any = b"") -> None:
            with watch.timing("digest"):
                self._hash = sha256(data)

        def update(self, data: Any) -> None:
            with watch.timing("digest"):
                self._hash.update(data)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    class Hashes:
        """In place of the module hashlib, where files are written and read."""

        sha256 = Hash

    sha256 = filesystem.hashlib.sha256
    filesystem.hashlib = Hashes  # type: ignore[assignment]
    watch.around(filesystem, "digest_file", "digest")
    watch.around(filesystem.Calls, "flush", "flush")
    for name in ("commit", "create", "publish", "write_view", "event"):
        watch.around(run_directory.RunDirectory, name, "record")
    for name in ("release", "clean"):
        watch.around(run_directory.RunDirectory, name, "tidy")
    watch.around(repair, "damaged_payloads", "check")
