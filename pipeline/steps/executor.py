"""Executor: does the steps of one run, each by its step kind."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.quantities import parse_size
from pipeline.config.run_config import DRAWING_FIELDS, RunConfig
from pipeline.engine.job import StepResult
from pipeline.engine.plan import Step, maker_of
from pipeline.errors import ConfigMismatch, DamagedData
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.step_transaction import Attempt
from pipeline.steps import payloads
from pipeline.steps.base import Sharing, StepKind
from pipeline.steps.context import StepContext
from pipeline.steps.registry import STEP_KINDS
from pipeline.steps.run_facts import config_of, environment_of, facts_of

if TYPE_CHECKING:
    from torch import Tensor

    from stages.interfaces import Callbacks, DurableCallbacks
    from stages.machine.device import DeviceChoices
    from stages.models.base import BlockModel


class StepExecutor:
    """Does the steps of one run (`pipeline.engine.job.Worker`)."""

    def __init__(
        self,
        run: RunDirectory,
        config: RunConfig,
        steps: Sequence[Step],
        shared_with: RunDirectory | None = None,
    ) -> None:
        """Prepare to do the steps of a run.

        Args:
            run: The run.
            config: Its configuration.
            steps: Its whole plan.
            shared_with: A run whose results are used where its step kinds allow that.
        """
        self.context = StepContext(run, config, shared_with)
        self._steps, self._shared_with = steps, shared_with
        self._kinds: dict[str, StepKind[Any]] = {}
        gc.freeze()  # what is here now stays: only what steps leave is looked at when they end

    @property
    def choices(self) -> DeviceChoices:
        """The device and the arithmetic that the run is done with."""
        return self.context.choices

    def execute(self, step: Step, attempt: Attempt, callbacks: DurableCallbacks) -> StepResult:
        """Do one step."""
        from stages.machine.device import PeakMemory, release_memory

        peak = PeakMemory(self.choices.torch_device)
        result = self._shared_result(step, attempt)
        if result is None:
            found = self._kind(step).run(self.context, step, attempt, callbacks)
            result = StepResult(found, peak.process_bytes(), peak.device_bytes())
            self._warn_of_excess(result, callbacks)
        self.context.release()
        release_memory(self.choices.torch_device)
        return result

    def replay(self, name: str, attempt: Attempt, callbacks: Callbacks) -> None:
        """Write the activation stream `name` again, from its samples and finished blocks alone."""
        from stages import export
        from stages.replay import replay

        stream, model, run = payloads.contents_of(name), self.context.model, self.context.run

        def pruned(block: int) -> Mapping[str, Tensor]:
            return export.block_state(model, block, run.open_file(payloads.pruned(block).name))

        replay(
            self.context.stage(callbacks, samples=stream.samples),
            self.context.activations(attempt, name, samples=stream.samples),
            stream.block,
            pruned if stream.is_biased else lambda block: None,
            attempt.scratch(),
        )

    def fit_memory(self) -> str | None:
        """Keep the remaining steps within --memory-limit, or what is free.

        The number of samples in a forward pass was fixed when the run began, because it decides the last bits.

        Returns:
            What to warn of: the machine may have too little memory.

        Raises:
            ResourceError: There is too little memory.
        """
        from pipeline.steps.stage_settings import fit_memory
        from stages.runtime.block_runner import samples_at_once

        context = self.context
        at_once = [samples_at_once(self.choices, context.config.seqlen)]
        fitting = fit_memory(context.model, context.config, self.choices, at_once, is_new=False)
        context.spills, context.left_bytes = fitting.spills, fitting.left_bytes
        context.distills_resident = fitting.distills_resident
        context.generates_resident = fitting.generates_resident
        return fitting.shortage

    def size_of(self, payload: str) -> int:
        """Estimated size of a payload on disk, in bytes."""
        step = maker_of(payload, self._steps)
        return self._kind(step).output_bytes(self.context, step, payload)

    def scratch_of(self, step: Step) -> int:
        """Estimated size on disk of a step's own intermediate streams, in bytes."""
        return self._kind(step).scratch_bytes(self.context, step)

    def _kind(self, step: Step) -> StepKind[Any]:
        if step.kind not in self._kinds:
            self._kinds[step.kind] = STEP_KINDS.get(step.kind)()
        return self._kinds[step.kind]

    def _warn_of_excess(self, result: StepResult, callbacks: Callbacks) -> None:
        """Warn if a step took more than --memory-limit: what it would take was only estimated."""
        limit = self.context.config.memory_limit
        if limit is None:
            return
        taken = result.peak_device_bytes or result.peak_memory_bytes or 0
        if taken > parse_size(limit):
            callbacks.warn(f"this step took {taken / 1e9:.2f} GB, more than --memory-limit {limit}")

    def _shared_result(self, step: Step, attempt: Attempt) -> StepResult | None:
        """The result of the same step in the other run, with its payloads; None where it cannot be used.

        The time and memory of steps that are taken over count, since this run consists of them.

        Raises:
            ConfigMismatch: This run takes over the steps of the other one, which lacks this one.
            DamagedData: A payload of the other run is damaged.
        """
        other, sharing = self._shared_with, STEP_KINDS.get(step.kind).sharing
        if other is None or sharing == "never":
            return None
        takes_over = self.context.config.from_run is not None
        if not takes_over and (sharing == "same steps" or not self._has_same_start(other, sharing)):
            return None
        commit = other.commit_for(step.name)
        # Whoever takes over blocks reads nothing any more of what only the steps between them read.
        wanted = [output for output in step.outputs if output.is_kept or not takes_over]
        is_there = commit is not None and all(
            output.name in commit.payloads and other.storage.exists(commit.payloads[output.name].root)
            for output in wanted
        )
        if takes_over and not is_there and (commit is not None or sharing == "same steps"):
            raise ConfigMismatch(
                f"--from-run {other.label}: it lacks what {step.name} wrote; make it again by `lampctl resume "
                f"{other.label} --check-all`"
            )
        if commit is None or not is_there:
            return None
        try:
            for output in wanted:
                attempt.adopt(output.name, other.storage, commit.payloads[output.name], is_bulky=output.is_stream)
        except DamagedData as error:
            raise DamagedData(f"{error}. `lampctl resume {other.label} --check-all` makes it again") from error
        found = commit.result_as(STEP_KINDS.get(step.kind).result)
        found = found.model_copy(update={"shared_with": other.manifest.digest})
        if not takes_over:
            return StepResult(found)
        return StepResult(found, commit.peak_memory_bytes, commit.peak_device_bytes, commit.elapsed_s)

    def _has_same_start(self, other: RunDirectory, sharing: Sharing) -> bool:
        """Whether another run has the same model and calibration set, and the same environment if that matters."""
        run, config, their_config = self.context.run, config_of(self.context.run), config_of(other)
        same_data = all(getattr(their_config, field) == getattr(config, field) for field in DRAWING_FIELDS)
        if not same_data or facts_of(other).identity.model != facts_of(run).identity.model:
            return False
        return sharing == "same data" or environment_of(other) == environment_of(run)


def original_model(run: RunDirectory, config: RunConfig) -> BlockModel:
    """The model that a run prunes, checked to be the one that the run began with."""
    return StepContext(run, config).model
