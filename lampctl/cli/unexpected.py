"""Report an unexpected error: whose code raised it, and the traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import TracebackType

from pipeline.rundir.redact import scrub
from stages.entry_points import packages_of_modules
from stages.errors import one_line

_OURS = ("lampctl", "pipeline", "stages")


def report_of(error: BaseException) -> str:
    """What to print for an error that no module raises on purpose, without secrets.

    The package of the innermost frame decides, among ours and those that add entries to a registry: code of other
    libraries is called by one of them.
    """
    lines = "".join(traceback.format_exception(error))
    return scrub(f"lampctl: {_whose(error)}. What was committed is safe.\n{lines}")


def _whose(error: BaseException) -> str:
    plugins = packages_of_modules()
    for module in reversed([*_modules(error.__traceback__)]):
        top = module.partition(".")[0]
        if top in _OURS:
            break
        if top in plugins:
            reason = one_line(f"{type(error).__name__}: {error}")
            return (
                f"the package {plugins[top]} failed in its module {module} ({reason}); update or uninstall "
                f"{plugins[top]}, or report it to its authors with the lines below"
            )
    return "this is a bug of ours; please report it with the lines below"


def _modules(trace: TracebackType | None) -> Iterator[str]:
    """The module of each frame, outermost first."""
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
