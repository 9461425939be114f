"""Prepare a run: model, configuration, budget and plan, all of them checked. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.adjust import adjusted_to, with_absolute_paths
from pipeline.config.completion import NUM_SAMPLES, SEQLEN, check_combinations, complete
from pipeline.config.gather import Gathered
from pipeline.config.run_config import RunConfig
from pipeline.engine.plan import Step
from pipeline.errors import ConfigError
from pipeline.runs.budget import PrunableLayers, allocate_budget, feasible_defaults
from pipeline.runs.environment import environment_record
from pipeline.runs.export_names import check_export
from pipeline.runs.origin import origin_of, require_same_samples, settled_with
from pipeline.runs.sources import check_sources, check_zero_shot
from pipeline.steps.lamp_plan import chain_of
from pipeline.steps.run_facts import EnvironmentRecord, IdentityRecord, ModelRecord, environment_of
from pipeline.steps.stage_settings import fit_memory
from stages.pruners.registry import LAMP

if TYPE_CHECKING:
    from stages.data.base import SourceDigest
    from stages.machine.device import DeviceChoices
    from stages.models.base import BlockModel
    from stages.sparsity.budget import BlockBudget
    from stages.training.presets import TrainingDefaults

RUNS = Path("runs")


@dataclass(frozen=True)
class Prepared:
    """A run that could begin: everything is known and checked, nothing is written."""

    config: RunConfig
    origins: dict[str, str]
    notices: tuple[str, ...]
    model: ModelRecord
    data: Mapping[str, SourceDigest | None]  # by the name of the data source
    environment: EnvironmentRecord
    budget: tuple[BlockBudget, ...]
    steps: tuple[Step, ...]

    @property
    def identity(self) -> IdentityRecord:
        """What makes another run the same as this one."""
        return IdentityRecord(settings=self.config.identity, model=self.model.files, data=dict(self.data))

    @property
    def default_run_dir(self) -> Path:
        """``runs/<model>-s<percent>-<method>``; ``<n>of<m>`` for a pattern, ``-int<bits>`` after either."""
        name = Path(self.config.model).name.removesuffix(".gguf") if "/" in self.config.model else self.config.model
        return RUNS / f"{name.lower()}-{self.config.slug}-{self.config.method}"


def prepare(gathered: Gathered, baselines: Sequence[str] = ()) -> Prepared:
    """Resolve the model, complete the configuration, compute the budget, check the data sources.

    Args:
        gathered: What the user gave.
        baselines: Methods that run beside this one with the same settings.

    Raises:
        ConfigError: The settings exclude each other, or do not fit the model.
        StageError: The model is unknown, the hub does not answer, no budget fits, a data source cannot be read, or the
            memory limit is too low.
    """
    from stages.machine.device import require_compiler
    from stages.models.registry import open_model
    from stages.models.resolve import resolve
    from stages.tasks.registry import task_named

    check_combinations(gathered)
    gathered = with_absolute_paths(gathered)
    settings = gathered.values
    if settings.compile:
        require_compiler(_device_of(gathered).torch_device)
    model = open_model(resolve(settings.model, settings.revision, trusts_code=settings.trust_remote_code))
    planned = plan_pruning(gathered, model, baselines)
    config, record, environment = planned.config, ModelRecord.of(model), environment_record(planned.device)
    origin = origin_of(config)
    if origin is not None:
        config = settled_with(origin, config, planned.origins, record)
        environment = environment_of(origin)  # the choices that its blocks were pruned with
    check_zero_shot(config, model)
    left_out = check_export(config, model)
    data = check_sources(config, model, task_named(model.task))
    if origin is not None:
        require_same_samples(origin, config, data)
    return Prepared(
        config=config,
        origins=planned.origins,
        notices=(*planned.notices, *left_out),
        model=record,
        data=data,
        environment=environment,
        budget=planned.budget,
        steps=chain_of(config, model.num_blocks),
    )


@dataclass(frozen=True)
class PlannedPruning:
    """How a model will be pruned: every default filled in, the budget of each block, the device."""

    config: RunConfig
    origins: dict[str, str]
    notices: tuple[str, ...]
    budget: tuple[BlockBudget, ...]
    device: DeviceChoices


def plan_pruning(
    gathered: Gathered, model: BlockModel, baselines: Sequence[str] = (), *, draws_samples: bool = True
) -> PlannedPruning:
    """Complete the settings for a model, and compute its budget.

    Args:
        gathered: What the user gave; combinations are checked already.
        model: From a folder or from memory.
        baselines: Methods that run beside this one with the same settings.
        draws_samples: There is a source to draw from. False: the calibration set is all that there is.

    Raises:
        ConfigError: The settings do not fit the model.
        StageError: No budget fits, or the memory limit is too low.
    """
    from stages.generate_samples import can_generate, generates_by_default
    from stages.tasks.registry import task_named

    gathered = adjusted_to(gathered, model)
    layers = PrunableLayers.of(model, gathered.values)
    defaults, notices = _defaults_for(gathered, model, layers)
    if not draws_samples:
        defaults = replace(defaults, distill_samples=None)
    if not generates_by_default(model, min(gathered.values.seqlen or SEQLEN, model.max_positions or SEQLEN)):
        defaults = replace(defaults, distill_generates=False)
    if gathered.values.distill_generated and not can_generate(model):
        raise ConfigError(f"--distill-generated: {model.source.name} ({model.name}) writes no text")
    completed = complete(gathered, model.max_positions, defaults, task_named(model.task), baselines)
    device = _fit_to_memory(completed.config, model, _device_of(gathered))
    return PlannedPruning(
        completed.config,
        completed.origins,
        (*layers.notices, *notices, *completed.notices),
        allocate_budget(layers, completed.config),
        device,
    )


def _device_of(gathered: Gathered) -> DeviceChoices:
    """The device, its arithmetic and threads, as the settings have them. Raises StageError for one that is missing."""
    from stages.machine.device import choose

    settings = gathered.values
    return choose(settings.device, settings.dtype, settings.threads).training_in(settings.train_dtype)


def _defaults_for(
    gathered: Gathered, model: BlockModel, layers: PrunableLayers
) -> tuple[TrainingDefaults, tuple[str, ...]]:
    """The defaults of LAMP for this model and sparsity, and notices where a default does not fit the layers."""
    from stages.training.presets import DEFAULT_EFFORT, measured, published

    settings = gathered.values
    if gathered.preset == "paper":
        defaults = published(model.name, settings.target_sparsity)
    else:
        effort, num_samples = settings.effort or DEFAULT_EFFORT, settings.num_samples or NUM_SAMPLES
        defaults = measured(model.name, settings.target_sparsity, model.num_blocks, effort, num_samples)
    if settings.method != LAMP or settings.pattern is not None:
        return defaults, ()
    return feasible_defaults(layers, settings, defaults)


def _fit_to_memory(config: RunConfig, model: BlockModel, choices: DeviceChoices) -> DeviceChoices:
    """The device choices with the largest micro-batch that fits. Raises ResourceError if none fits."""
    from stages.machine.device import micro_batches

    at_once = micro_batches(choices.torch_device, config.seqlen, config.micro_batch)
    fitting = fit_memory(model, config, choices, at_once, is_new=True)
    return replace(choices, batch_tokens=fitting.samples_at_once * config.seqlen, compiles=bool(config.compile))
