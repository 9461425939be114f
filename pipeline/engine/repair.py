"""Make damaged payloads again before a run goes on, bit for bit, and put them back where they were.

A stream of activations is made by running finished blocks forward (`Worker.replay`), anything else by doing its step
once more; what that needs and is gone is made first. The result must have the committed digests. A step that now gives
other weights, which happens on another machine only, is taken out of force with all that was built on it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.engine.plan import Step, is_stream, maker_of, needed, sources_of
from pipeline.engine.runner import Listener, StopRequest, Worker, callbacks_for
from pipeline.engine.verify import damaged_payloads
from pipeline.errors import DamagedData
from pipeline.rundir.records import Payload
from pipeline.rundir.run_directory import Attempt, RunDirectory


def mend(
    run: RunDirectory,
    steps: Sequence[Step],
    worker: Worker,
    free: Mapping[str, Any],
    listener: Listener,
    stop: StopRequest,
    *,
    is_deep: bool = True,
    allows_other_bits: bool = False,
) -> None:
    """Make every payload sound that is still needed, telling the listener what was done.

    is_deep: compare digests; else presence and sizes. allows_other_bits: a stream that comes out otherwise, on another
    machine than it was made on, is committed anew as it is here. Raises DamagedData for one where that is not allowed;
    Preempted or Interrupted; what a step raises.
    """
    while True:
        names = needed(steps, [commit.step for commit in run.commits])
        damaged = damaged_payloads(run, names, is_deep=is_deep)
        if not damaged:
            return
        run.forget_checks()
        name, reason = next(iter(damaged.items()))
        listener.warn(f"{run.label}/{reason}: {name} is made again")
        if not _Mending(run, steps, worker, free, listener, stop, allows_other_bits).make(name):
            commit = run.find(name)[0]
            run.invalidate(commit.number, f"{name} was damaged, and {commit.step} gives another one here", free)
            run.event("invalidated", from_number=commit.number, step=commit.step)
            listener.warn(
                f"{commit.step} gives other weights here than it did (another machine, or other versions): it and "
                "the steps after it are done again"
            )


class _Mending:
    """Makes one payload, and those that it needs."""

    def __init__(
        self,
        run: RunDirectory,
        steps: Sequence[Step],
        worker: Worker,
        free: Mapping[str, Any],
        listener: Listener,
        stop: StopRequest,
        allows_other_bits: bool,
    ) -> None:
        self._run, self._steps, self._worker, self._free = run, steps, worker, free
        self._listener, self._stop, self._allows_other_bits = listener, stop, allows_other_bits

    def make(self, name: str) -> bool:
        """Put the payload back; False if it is made of weights, and comes out otherwise."""
        for source in sources_of(name, self._steps):
            if damaged_payloads(self._run, [source], is_deep=True) and not self.make(source):
                return False
        step = maker_of(name, self._steps)
        commit, payload = self._run.find(name)
        callbacks = callbacks_for(step, self._listener, self._stop)
        # Under a name of its own: it will be a record only if it comes out otherwise.
        attempt = self._run.begin_again(f"rebuild/{name}")
        is_committed = False
        started_at, start = datetime.now(UTC), time.monotonic()
        try:
            if is_stream(name):
                self._worker.replay(name, attempt, callbacks)
            else:
                self._worker.execute(step, attempt, callbacks)
            made = attempt.seal()[name]
            if not _is_same(made, payload):
                if is_stream(name) and self._allows_other_bits:
                    elapsed_s = time.monotonic() - start
                    figures = {"replaces": commit.number}
                    self._run.commit(
                        attempt, figures=figures, free=self._free, started_at=started_at, elapsed_s=elapsed_s
                    )
                    is_committed = True
                    self._run.event("rebuilt", payload=name, step=commit.step)
                    self._listener.warn(f"{name} has other bits here than it had: the run goes on with them")
                    return True
                if is_stream(name):
                    raise DamagedData(
                        f"{name} of {commit.step} in {self._run.label} was damaged, and running the finished blocks "
                        "gives other bits here than it did. Resume on the kind of machine, and with the versions, "
                        "that the run began with; with --allow-environment-change, to go on with other bits; or start "
                        "over in a new run directory"
                    )
                return False
            self._put_back(attempt, made, payload)
        finally:
            if not is_committed:
                self._run.storage.remove(f"data/{attempt.id}")
        self._run.event("mended", payload=name, step=commit.step)
        return True

    def _put_back(self, attempt: Attempt, made: Payload, payload: Payload) -> None:
        self._run.check_superseded()
        self._run.storage.put_back(made.root, payload.root)
        self._run.forget_checks()


def _is_same(made: Payload, committed: Payload) -> bool:
    """Whether both have the same files, wherever they lie."""

    def contents(payload: Payload) -> set[tuple[str, int, str]]:
        return {(payload.inner(file), file.size, file.sha256) for file in payload.files}

    return contents(made) == contents(committed)
