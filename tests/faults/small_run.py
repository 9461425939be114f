"""A run of three blocks by the real engine, run directory and store, whose stages only compute digests.

So thousands of crashes fit into a minute. What a step writes follows from what it reads, to the last byte, as it does
in the real stages; streams can be made again from the calibration set and the pruned blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.job import Job, StepResult
from pipeline.engine.plan import Step, is_stream
from pipeline.engine.repair import repair
from pipeline.engine.runner import advance
from pipeline.engine.stop import StopRequest
from pipeline.errors import PipelineError, RunNotFound
from pipeline.rundir.records import Result, RunManifest
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.step_transaction import Attempt
from pipeline.rundir.storage.base import Storage
from pipeline.steps.lamp_plan import DistillationPlan, chain
from stages.interfaces import Callbacks, Checkpoint, DurableCallbacks

STEPS = chain(3, compensates=True, refines=True, distillation=DistillationPlan())
_SHAPE = (2, 2)
_NUM_SAMPLES = 2
_NUM_BATCHES = 2
_NUM_UPDATES = 3
_FREE: dict[str, Any] = {}


class Read(Result):
    """Digest of what a step read."""

    read: str


class Silent:
    """A `pipeline.engine.job.Listener` that records its calls."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step_started(self, step: Step, position: int, total: int) -> None:
        """Nobody listens."""

    def step_resumed(self, step: Step) -> None:
        """Nobody listens."""

    def step_progress(self, step: Step, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        """Nobody listens."""

    def step_finished(self, step: Step, commit: Any, position: int, total: int) -> None:
        """Nobody listens."""

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class StandIn:
    """A `pipeline.engine.job.Worker` whose results are digests of what it read."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.executed: list[str] = []
        self._fresh: dict[str, bytes] = {}

    def execute(self, step: Step, attempt: Attempt, callbacks: DurableCallbacks) -> StepResult:
        self.executed.append(step.name)
        restored = callbacks.restore()
        done = 0 if restored is None else restored.figures["done"]
        in_parts = step.kind == "distill"
        state = self._in_parts(done, callbacks) if in_parts else b""
        for batch in range(done, 0 if in_parts else _NUM_BATCHES):
            callbacks.checkpoint(
                lambda batch=batch: Checkpoint({"state": torch.full((2,), float(batch))}, {"done": batch})
            )
            callbacks.report(batch + 1, _NUM_BATCHES, "batches")
        read = [*([state] if in_parts else ()), *(self._contents(name) for name in step.reads)]
        self._fresh = {}
        # Streams last: they follow from the weights that the step writes.
        for name in sorted(step.writes, key=lambda name: is_stream(name, STEPS)):
            if is_stream(name, STEPS) or name == "calibration":
                self._write_stream(name, attempt)
            elif name == "model":
                self._write_model(attempt)
            else:
                self._fresh[name] = _digest(name.encode(), *read) * 20
                attempt.write_file(name, "block.safetensors", self._fresh[name])
        return StepResult(Read(read=_digest(*read).hex()))

    def _in_parts(self, done: int, callbacks: DurableCallbacks) -> bytes:
        """Updates of a state in two parts, as distillation makes them. The next part depends on the one before."""
        parts = ("part-0", "part-1")
        for update in range(done, _NUM_UPDATES):
            for part in parts:
                before = bytes(callbacks.kept(part)["state"].tolist()) if update else b""
                after = _digest(part.encode(), bytes([update]), before)
                callbacks.keep(part, {"state": torch.tensor(list(after), dtype=torch.uint8)})
            callbacks.checkpoint_now(lambda update=update: Checkpoint({}, {"done": update + 1}, parts))
        return _digest(*(bytes(callbacks.kept(part)["state"].tolist()) for part in parts))

    def replay(self, name: str, attempt: Attempt, callbacks: Callbacks) -> None:
        callbacks.check_stop()
        self._write_stream(name, attempt)

    def refresh_views(self) -> None:
        if self.run.commit_for("export") is not None:
            self.run.publish("model")
            self.run.write_view("model/README.md", b"card")

    def _write_stream(self, name: str, attempt: Attempt) -> None:
        is_precious = name == "calibration"
        stream = attempt.stream(name, _NUM_SAMPLES, _SHAPE, torch.float32, is_precious=is_precious)
        kind, _, number = name.partition("/")
        sources = [] if is_precious else [self._contents("calibration")]
        if kind == "biased":
            sources += [self._contents(f"pruned/{block}") for block in range(int(number))]
        for index in range(_NUM_SAMPLES):
            digest = _digest(name.encode(), bytes([index]), *sources)
            stream.write(index, torch.tensor(list(digest[:4]), dtype=torch.float32).reshape(_SHAPE))

    def _write_model(self, attempt: Attempt) -> None:
        folder = attempt.folder("model")
        for block in range(3):
            folder.link(f"block-{block}.safetensors", self.run.payload(f"distilled/{block}").files[0])
        folder.write("config.json", b"{}")

    def _contents(self, name: str) -> bytes:
        if name in self._fresh:
            return self._fresh[name]
        if is_stream(name, STEPS) or name == "calibration":
            stream = self.run.open_stream(name)
            return b"".join(stream[index].numpy().tobytes() for index in range(len(stream)))
        return self.run.open_file(name).read_bytes()


def _digest(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()


def manifest() -> RunManifest:
    """The same for every run, so that all of them have the same digests."""
    return RunManifest.new(
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        config={},
        provenance={},
        identity={},
        model={},
        environment={},
        budget=[],
        plan=[step.name for step in STEPS],
    )


def open_or_create(place: Path | Storage) -> RunDirectory:
    """The run at `place`, begun if it is not there: what `lampctl run` does, again and again."""
    try:
        return RunDirectory.open(place, is_resuming=True)
    except RunNotFound:
        return RunDirectory.create(place, manifest())


def go(place: Path | Storage, stop: StopRequest | None = None, checkpoint_every_s: float = 1e-9) -> StandIn:
    """Do all that is left of the run, and repair what is damaged; gives the worker, which knows what it did."""
    run = open_or_create(place)
    worker, listener = StandIn(run), Silent()
    stop = stop or StopRequest(_never)
    job = Job(
        run,
        STEPS,
        worker,
        listener,
        stop,
        _FREE,
        refresh_views=worker.refresh_views,
        checkpoint_every_s=checkpoint_every_s,
    )
    repair(job)
    advance(job)
    return worker


def _never(error: PipelineError) -> None:
    raise AssertionError(error)


def result(place: Path | Storage) -> dict[str, Any]:
    """What must be the same in every run: the steps in order, and every payload's digests, released ones too."""
    run = RunDirectory.open(place)
    return {
        commit.step: {
            "result": commit.result,
            "payloads": {
                name: sorted((payload.inner(file), file.sha256) for file in payload.files)
                for name, payload in commit.payloads.items()
            },
        }
        for commit in run.commits
    }


def require_clean(place: Path, expected: Mapping[str, Any]) -> None:
    """The finished run is the undisturbed one, its view is whole, and nothing that crashes left is still there."""
    assert result(place) == expected
    run = RunDirectory.open(place)
    assert run.is_published("model")
    assert run.leftovers() == []
    kept = {commit.attempt for commit in run.commits}
    assert {path.name for path in (place / "data").iterdir()} <= kept
    allowed = {"run.json", "commits", "data", "progress", "model", "events.jsonl"}
    assert {path.name for path in place.iterdir()} <= allowed, sorted(path.name for path in place.iterdir())
