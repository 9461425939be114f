"""Progress of work outside steps, such as packing: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from stages.interfaces import Watcher

# Seconds between two lines in a log.
_EVERY_S = 10.0


class _Lines:
    """Prints progress as lines (`stages.interfaces.Watcher`)."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._printed_at = time.monotonic()

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        if time.monotonic() - self._printed_at > _EVERY_S:
            self._printed_at = time.monotonic()
            self._print(f"{self._title}: {done}/{total} {unit}")

    def check_stop(self) -> None:
        """Do nothing: a signal stops this work at once."""

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


class _Bar(_Lines):
    """Shows a bar, with warnings above it."""

    def __init__(self, console: Console, title: str, progress: Progress) -> None:
        super().__init__(console, title)
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def report(self, done: int, total: int, unit: str, **figures: float) -> None:
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def showing_files(title: str) -> Iterator[Watcher]:
    """Give a watcher that shows the progress of a stage on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, markup=False)  # paths may hold brackets
    if not console.is_terminal:
        yield _Lines(console, title)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        yield _Bar(console, title, progress)
