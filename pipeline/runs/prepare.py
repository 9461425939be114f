"""From settings to a run that could begin: model, configuration, budget and plan, all checked, nothing written."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.completion import BASELINE, check_combinations, complete
from pipeline.config.gather import Gathered
from pipeline.config.run_config import LAMP_FIELDS, RunConfig
from pipeline.config.settings import flag_of
from pipeline.engine.plan import Step
from pipeline.errors import ConfigError
from pipeline.steps.lamp_plan import chain_of
from pipeline.steps.stage_settings import drawing_of, fit_memory, fixed_sparsities, prunable_layers, task_data_of
from stages.pruners.registry import LAMP, method_names
from stages.version import VERSION

if TYPE_CHECKING:
    from stages.models.base import BlockModel
    from stages.tasks.base import Task

RUNS = Path("runs")


@dataclass(frozen=True)
class Prepared:
    """A run that could begin: everything is known and checked, nothing is written."""

    config: RunConfig
    origins: dict[str, str]
    notices: tuple[str, ...]
    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    budget: tuple[Any, ...]  # stages.sparsity.budget.BlockBudget, one a block
    steps: tuple[Step, ...]

    @property
    def default_run_dir(self) -> Path:
        """``runs/<model>-s<percent>-<method>``; a pattern (2of4) in place of the percentage, -int<bits> behind."""
        name = Path(self.config.model).name.removesuffix(".gguf") if "/" in self.config.model else self.config.model
        return RUNS / f"{name.lower()}-{self.config.slug}-{self.config.method}"


def prepare(gathered: Gathered, baselines: Sequence[str] = ()) -> Prepared:
    """Find the model, fill in the defaults, compute the budget, check the sources. Writes nothing to the run.

    baselines: methods that are run beside it with the same settings.

    Raises what the stages raise for an unknown model, a hub out of reach, an infeasible budget, a text that is
    not there.
    """
    from stages.machine.device import choose, micro_batches, require_compiler
    from stages.metrics.zero_shot import check_tasks
    from stages.models.resolve import resolve
    from stages.sparsity.budget import feasible_alpha, feasible_beta
    from stages.sparsity.nm_pattern import Pattern
    from stages.tasks.registry import open_model, task_named
    from stages.training.presets import measured, published

    check_combinations(gathered)
    gathered = with_absolute_paths(gathered)
    settings = gathered.values
    choices = choose(settings.device, settings.dtype, settings.threads)
    if settings.compile:
        require_compiler(choices.torch_device)
    folder = resolve(settings.model, settings.revision, trusts_code=settings.trust_remote_code)
    model = open_model(folder)
    task = task_named(model.task)
    gathered = _without_foreign_data(_with_fixed_samples(gathered, model), model)
    settings = gathered.values
    shapes = prunable_layers(model, settings.ignore)
    widest = max(layer.cols for block in shapes for layer in block)
    if settings.group_size is not None and settings.group_size > widest:
        raise ConfigError(f"--group-size {settings.group_size}: no layer has more than {widest} columns; leave it out")
    fixed = fixed_sparsities(shapes, settings.layer_sparsity)

    pattern = Pattern.parse(settings.pattern) if settings.pattern is not None else None
    sparsity = pattern.sparsity if pattern is not None else settings.sparsity
    assert sparsity is not None
    if gathered.preset == "paper":
        defaults = published(model.name, sparsity)
    else:
        defaults = measured(model.name, sparsity, model.num_blocks, settings.effort or "medium")
    notices = []
    if settings.method == LAMP and pattern is None:
        free_shapes = [[layer for layer in block if layer.name not in fixed] for block in shapes]
        beta = settings.beta if settings.beta is not None else defaults.beta
        if settings.beta is None:
            wanted_alpha = settings.alpha if settings.alpha is not None else 1.0
            beta = feasible_beta(free_shapes, sparsity, wanted_alpha, defaults.beta)
        alpha = settings.alpha if settings.alpha is not None else defaults.alpha
        if settings.alpha is None:
            alpha = feasible_alpha(free_shapes, sparsity, defaults.alpha, beta)
        for name, value, default in (("alpha", alpha, defaults.alpha), ("beta", beta, defaults.beta)):
            if getattr(settings, name) is None and value != default:
                notices.append(f"{name} is {value:.4g} instead of {default:.4g}: no layer can be pruned above 100%")
        defaults = replace(defaults, alpha=alpha, beta=beta)
    config, origins, more_notices = complete(gathered, model.max_positions, defaults, task, baselines)
    if config.tasks and model.task != "language":
        raise ConfigError(f"--tasks: {folder.name} is a {model.task} model, and zero-shot tasks are text")
    check_tasks(config.tasks, task_data_of(config))
    at_once = micro_batches(choices.torch_device, config.seqlen, config.micro_batch)
    fitting = fit_memory(model, config, choices, at_once)
    choices = replace(choices, batch_tokens=fitting.samples_at_once * config.seqlen, compiles=bool(config.compile))
    budget = _allocate(shapes, config, fixed)
    return Prepared(
        config=config,
        origins=origins,
        notices=(*notices, *more_notices),
        model=_model_record(model, folder),
        data=_check_sources(config, model, task),
        environment=environment_record(asdict(choices)),
        budget=budget,
        steps=chain_of(config, model.num_blocks),
    )


def sibling(gathered: Gathered, method: str) -> Gathered:
    """The same settings for another method, to be compared with: what only the first method has is dropped."""
    dropped = {"alpha", "beta"} if method == LAMP else {"alpha", "beta", *LAMP_FIELDS}
    changes: dict[str, Any] = dict.fromkeys(dropped)
    if method not in method_names():
        raise ConfigError(f"--baseline {method}: choose one of {', '.join(method_names())}")
    values = gathered.values.changed(**{**changes, "method": method, "evaluate_dense": False})
    origins = {name: origin for name, origin in gathered.origins.items() if name not in dropped}
    origins["method"] = BASELINE
    return Gathered(values, origins, gathered.preset)


def with_absolute_paths(gathered: Gathered) -> Gathered:
    """The settings with local paths made absolute: a run can be resumed from another folder."""
    from stages.formats.file_digest import local_path
    from stages.tasks.registry import parse_source

    settings = gathered.values
    changes: dict[str, Any] = {}
    path = local_path(settings.model)
    if path.exists():
        changes["model"] = str(path.resolve())
    if settings.calibration is not None:
        changes["calibration"] = parse_source(settings.calibration).name
    if settings.evaluate is not None:
        changes["evaluate"] = tuple(parse_source(source).name for source in settings.evaluate)
    return Gathered(settings.changed(**changes), gathered.origins, gathered.preset)


def _with_fixed_samples(gathered: Gathered, model: BlockModel) -> Gathered:
    """The settings with the number of tokens that every sample of this model has, if it leaves no choice."""
    from stages.tasks.registry import task_named

    if model.fixed_tokens is None:
        return gathered
    for field in ("seqlen", "eval_seqlen", "eval_max_tokens"):
        if gathered.given(field):
            raise ConfigError(
                f"{flag_of(field)}: every sample of {model.source.name} has {model.fixed_tokens} patches; leave it out"
            )
    fixed = {"seqlen": model.fixed_tokens, "eval_seqlen": model.fixed_tokens, "eval_max_tokens": None}
    points = gathered.values.eval_points or task_named(model.task).default_points
    values = gathered.values.changed(**fixed, eval_points=points)
    return Gathered(values, gathered.origins, gathered.preset)


def _without_foreign_data(gathered: Gathered, model: BlockModel) -> Gathered:
    """The settings without the data that a preset names for another kind of model."""
    from stages.tasks.registry import parse_source

    settings = gathered.values
    named = {"calibration": (settings.calibration,), "evaluate": settings.evaluate}
    foreign = [
        field
        for field, names in named.items()
        if not gathered.given(field) and any(parse_source(name).task != model.task for name in names or () if name)
    ]
    changes = dict.fromkeys(foreign)
    return Gathered(settings.changed(**changes), gathered.origins, gathered.preset)


def _allocate(blocks: Sequence[Sequence[Any]], config: RunConfig, fixed: Mapping[str, float]) -> tuple[Any, ...]:
    from stages.sparsity.budget import allocate, follow_pattern

    pattern = config.n_of_m
    if pattern is not None:
        return follow_pattern(blocks, pattern)
    assert config.alpha is not None
    assert config.beta is not None
    return allocate(blocks, config.target_sparsity, config.alpha, config.beta, fixed)


def _check_sources(config: RunConfig, model: BlockModel, task: Task) -> dict[str, Any]:
    """The digest of each local source, after making sure that each can be read and is large enough."""
    from stages.tasks.base import require_task
    from stages.tasks.registry import parse_source

    digests: dict[str, Any] = {}
    if config.calibration is not None:
        source = parse_source(config.calibration)
        require_task(source, model)
        source.check()
        task.require_samples(model, source, drawing_of(config))
        digests[config.calibration] = source.digest()
    for name in config.evaluate:
        source = parse_source(name)
        require_task(source, model)
        source.check()
        task.require_measurable(model, source, config.evaluation_protocol)
        digests[name] = source.digest()
    return digests


def _model_record(model: Any, folder: Any) -> dict[str, Any]:
    return {
        "name": folder.name,
        "source": folder.source,
        "revision": folder.revision,
        "files": {name: {"size": d.size, "sha256": d.sha256} for name, d in folder.files.items()},
        "model_type": model.name,
        "task": model.task,
        "num_blocks": model.num_blocks,
        "hidden_size": model.hidden_size,
        "max_positions": model.max_positions,
    }


def environment_record(device: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and device choices that decide the last bits."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "zarr")}
    return {"python": platform.python_version(), "packages": {"lampctl": VERSION, **others}, "device": dict(device)}
