"""`lampctl` in this process, under stop watches: how long it waits, and when the first useful arithmetic begins.

    python -m benchmarks.performance.watched_run REPORT [--until-compute] -- run smollm2-135m ...

Writes REPORT as JSON: seconds since the process began (`wall`, `first_compute`), the seconds in which the thread that
computes does not (`waits`, by kind), and when samples of one pass were read, used and written (`timeline`).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.durability.stop_watch import StopWatch, run_lampctl, watch_durability

_TIMELINE_STEP, _TIMELINE_EVENTS = "refine-block/1", 400


def since_start() -> float:
    """Seconds since this process was begun, by the clock of the system."""
    started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def main() -> None:
    report, arguments = Path(sys.argv[1]), sys.argv[2:]
    until_compute = arguments[0] == "--until-compute"
    arguments = arguments[arguments.index("--") + 1 :]
    watch = StopWatch(main_only=True)
    found: dict[str, Any] = {"first_compute": None, "timeline": []}

    from pipeline.engine import runner
    from pipeline.rundir import filesystem
    from stages.runtime import block_runner, prefetch

    watch_durability(watch)
    watch.around(filesystem.FileWriter, "write", "write")
    watch.around(prefetch.Reading, "_take", "wait for reading")
    watch.around(prefetch.Writing, "_wait_for_room", "wait for writing")
    watch.around(prefetch.Writing, "_finish", "wait for writing")
    current = {"step": ""}
    begin = runner.RunDirectory.begin

    @functools.wraps(begin)
    def noting(run: Any, step: str) -> Any:
        current["step"] = step
        return begin(run, step)

    runner.RunDirectory.begin = noting  # type: ignore[method-assign]

    def line(owner: Any, name: str, kind: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            if kind == "compute" and found["first_compute"] is None:
                found["first_compute"] = since_start()
                if until_compute:  # all that was to be seen: what is left is what a crash would leave
                    report.write_text(json.dumps({**found, "wall": since_start(), "waits": {}}))
                    os._exit(0)
            try:
                return function(*args, **kwargs)
            finally:
                if current["step"] == _TIMELINE_STEP and len(found["timeline"]) < _TIMELINE_EVENTS:
                    found["timeline"].append((kind, start, time.perf_counter()))

        setattr(owner, name, timed)

    line(block_runner.BlockRunner, "forward", "compute")
    line(prefetch, "_stacked", "read")
    from pipeline.rundir.activation_store import ActivationStream

    line(ActivationStream, "write", "write")
    run_lampctl(arguments)
    report.write_text(json.dumps({**found, "wall": since_start(), "waits": watch.seconds}))


if __name__ == "__main__":
    main()
