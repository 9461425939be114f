"""What every step works with: the run, its configuration, the original model and the device."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Output, Step
from pipeline.errors import ConfigMismatch
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.step_transaction import Attempt
from pipeline.steps import payloads
from pipeline.steps.run_facts import environment_of, facts_of

if TYPE_CHECKING:
    from pipeline.rundir.activation_store import ActivationStream
    from stages.interfaces import Callbacks, Scratch, Stream
    from stages.machine.device import DeviceChoices
    from stages.models.base import BlockModel, ModelFolder
    from stages.runtime.block_context import BlockOutput, StageContext
    from stages.tasks.base import Task


class StepContext:
    """The run, its configuration, the original model and the device, for one process.

    Attributes:
        run: The run directory.
        config: Its configuration.
        shared_with: Another run whose results are used, such as the main run of a baseline.
        spills: Samples that do not fit into memory while a block is trained go to scratch streams.
        left_bytes: What the run may take beside the memory that the process took before; None: not known yet.
        distills_resident: All blocks fit into memory while the model is distilled.
        generates_resident: All blocks fit into memory while the original model generates samples.
    """

    def __init__(self, run: RunDirectory, config: RunConfig, shared_with: RunDirectory | None = None) -> None:
        self.run, self.config, self.shared_with = run, config, shared_with
        self.spills = False
        self.left_bytes: int | None = None
        self.distills_resident = False
        self.generates_resident = False

    @cached_property
    def choices(self) -> DeviceChoices:
        """The device and the arithmetic that the run is done with."""
        from stages.machine.device import DeviceChoices

        return DeviceChoices(**environment_of(self.run).device.model_dump())

    def release(self) -> None:
        """Free what the model keeps between two uses: embeddings and head."""
        if "model" in self.__dict__:  # it has been opened
            self.model.drop_ends()

    @cached_property
    def model(self) -> BlockModel:
        """The original model, checked to be the one that the run began with."""
        from stages.errors import ResourceError
        from stages.models.deciding_files import changed_files
        from stages.models.registry import open_model
        from stages.models.resolve import resolve

        recorded = facts_of(self.run).model
        if recorded.source in ("folder", "pickle", "gguf") and not Path(self.config.model).exists():
            raise ResourceError(
                f"{self.config.model}, the model that this run was begun with, is gone: put it back (a symbolic link "
                "will do)"
            )
        folder = resolve(self.config.model, recorded.revision, trusts_code=self.config.trust_remote_code)
        found = {name: digest.sha256 for name, digest in folder.files.items()}
        expected = {name: digest.sha256 for name, digest in recorded.files.items()}
        if changed := changed_files(expected, found):
            raise ConfigMismatch(
                f"{self.config.model} is no longer the model that this run began with "
                f"(changed: {', '.join(changed)}); put the old files back or start a new run"
            )
        return open_model(folder)

    @property
    def task(self) -> Task:
        """How this kind of model is calibrated and measured."""
        from stages.tasks.registry import task_named

        return task_named(self.model.task)

    @property
    def calibration(self) -> Stream:
        """The calibration set."""
        return self.run.open_stream(payloads.CALIBRATION.name)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Shape of one sample's activations."""
        return self.model.hidden_shape(tuple(self.calibration[0].shape))

    def activations(self, attempt: Attempt, name: str, *, samples: Output = payloads.CALIBRATION) -> ActivationStream:
        """A new activation stream with one sample for each of `samples`."""
        inputs = self.run.open_stream(samples.name)
        shape = self.model.hidden_shape(tuple(inputs[0].shape))
        return attempt.stream(name, len(inputs), shape, self.choices.torch_dtype)

    def stage(
        self, callbacks: Callbacks, *, reads_data: bool = True, samples: Output = payloads.CALIBRATION
    ) -> StageContext:
        """What a stage needs: the model, samples if it reads data, the device, the callbacks."""
        from stages.runtime.block_context import StageContext

        return StageContext(
            self.model, self.run.open_stream(samples.name) if reads_data else (), self.choices, callbacks
        )

    def block_output(self, step: Step, attempt: Attempt) -> BlockOutput:
        """How the step's block is exported, and the stream of its outputs, if the step writes it."""
        from stages.export import block_dtypes
        from stages.runtime.block_context import BlockOutput

        assert step.block is not None
        name = payloads.biased(step.block + 1).name
        stream = self.activations(attempt, name) if name in step.writes else None
        return BlockOutput(block_dtypes(self.model, step.block, self.config.export_dtype), stream)

    def spill(self, attempt: Attempt) -> Scratch | None:
        """Scratch streams for samples that do not fit into memory; None where all fit."""
        return attempt.scratch() if self.spills else None

    def room_bytes(self, block: int) -> int | None:
        """How many bytes the statistics of a block may take at once; None: all of them fit."""
        from pipeline.steps.stage_settings import statistics_room

        if self.left_bytes is None:
            return None
        return statistics_room(self.model, block, self.config, self.choices, self.left_bytes)

    def exported_folder(self) -> ModelFolder:
        """The exported model, checked to be what was committed."""
        from stages.models.resolve import resolve

        name = payloads.MODEL.name
        payload = self.run.payload(name)
        for file in payload.files:
            self.run.open_file(name, payload.inner(file))
        return resolve(str(self.run.publish(name)), trusts_code=self.config.trust_remote_code)

    @property
    def distillation_samples(self) -> Output:
        """The payload with the samples to distill on."""
        return payloads.DISTILLATION_SET if self.config.distill_samples is not None else payloads.CALIBRATION

    @property
    def num_generated_tokens(self) -> int:
        """Number of tokens in the samples to distill on that the original model writes."""
        return (self.config.distill_generated or 0) * self.config.seqlen

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the calibration set."""
        return (self.config.num_samples or 0) * self.config.seqlen

    @property
    def num_distillation_tokens(self) -> int:
        """Number of tokens in the samples to distill on."""
        return (self.config.distill_samples or self.config.num_samples or 0) * self.config.seqlen

    @property
    def stream_bytes(self) -> int:
        """Size of one activation stream over the calibration set."""
        return self.activation_bytes(self.num_tokens)

    def activation_bytes(self, num_tokens: int) -> int:
        """Size in bytes of the activations of this number of tokens at one place in the model."""
        return num_tokens * self.model.hidden_size * self.choices.torch_dtype.itemsize
