"""Begin a run, find one again, go on with it: what the commands share.

gathered settings --prepare--> configuration, model, budget, plan --start--> run directory --go_on--> model
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from pipeline.config import (
    LAMP_FIELDS,
    Gathered,
    Method,
    RunConfig,
    check_combinations,
    check_evaluation,
    complete,
    differing_fields,
    explain,
)
from pipeline.engine import Listener, StopRequest, advance
from pipeline.errors import (
    ConfigError,
    ConfigMismatch,
    DamagedData,
    FileExists,
    RunNotFound,
    StepOrderError,
)
from pipeline.manifest import RunManifest
from pipeline.plan import Evaluation, Step, chain, evaluation_steps, next_steps
from pipeline.rundir import RunDirectory, find_runs

log = logging.getLogger(__name__)

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
    budget: tuple[Any, ...]  # stages.budget.BlockBudget, one a block
    steps: tuple[Step, ...]

    @property
    def default_run_dir(self) -> Path:
        """``runs/<model>-s<percent>-<method>``; a pattern (2of4) in place of the percentage, -int<bits> behind."""
        name = Path(self.config.model).name.removesuffix(".gguf") if "/" in self.config.model else self.config.model
        return RUNS / f"{name.lower()}-{self.config.slug}-{self.config.method}"


def prepare(gathered: Gathered) -> Prepared:
    """Find the model, fill in the defaults, compute the budget, check the sources. Writes nothing to the run.

    Raises what the stages raise for an unknown model, a hub out of reach, an infeasible budget, a text that is
    not there.
    """
    from stages.budget import feasible_alpha, feasible_beta
    from stages.defaults import measured, published
    from stages.device import choose
    from stages.models.decoder import open_model
    from stages.models.source import resolve
    from stages.pruners.masks import Pattern

    check_combinations(gathered)
    settings = _with_absolute_paths(gathered)
    gathered = Gathered(settings, gathered.origins, gathered.preset)
    choices = choose(settings.device, settings.dtype)
    folder = resolve(settings.model, settings.revision)
    model = open_model(folder)
    shapes = _prunable_layers(model, settings.ignore)
    fixed = _fixed_sparsities(shapes, settings.layer_sparsity)

    pattern = Pattern.parse(settings.pattern) if settings.pattern is not None else None
    sparsity = pattern.sparsity if pattern is not None else settings.sparsity
    assert sparsity is not None
    if gathered.preset == "paper":
        defaults = published(model.name, sparsity)
    else:
        defaults = measured(model.name, sparsity, model.num_blocks, settings.effort or "medium")
    notices = []
    if settings.method == "lamp" and pattern is None:
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
    config, origins, more_notices = complete(gathered, model.max_positions, defaults)
    budget = _allocate(shapes, config, fixed)
    return Prepared(
        config=config,
        origins=origins,
        notices=(*notices, *more_notices),
        model=_model_record(model, folder),
        data=_check_sources(config, folder.path, model.vocab_size),
        environment=environment_record(asdict(choices)),
        budget=budget,
        steps=chain_of(config, model.num_blocks),
    )


def sibling(gathered: Gathered, method: str) -> Gathered:
    """The same settings for another method, to be compared with: what only the first method has is dropped."""
    dropped = {"alpha", "beta"} if method == "lamp" else {"alpha", "beta", *LAMP_FIELDS}
    changes: dict[str, Any] = dict.fromkeys(dropped)
    if method not in get_args(Method):
        raise ConfigError(f"--baseline {method}: choose one of {', '.join(get_args(Method))}")
    values = gathered.values.model_copy(update={**changes, "method": method, "evaluate_dense": False})
    origins = {name: origin for name, origin in gathered.origins.items() if name not in dropped}
    return Gathered(values, origins, gathered.preset)


def _with_absolute_paths(gathered: Gathered) -> Any:
    """The settings with local paths made absolute: a run can be resumed from another folder."""
    from stages.data.sources import parse_source
    from stages.filedigest import local_path

    settings = gathered.values
    changes: dict[str, Any] = {}
    path = local_path(settings.model)
    if path.exists():
        changes["model"] = str(path.resolve())
    if settings.calibration is not None:
        changes["calibration"] = parse_source(settings.calibration).name
    if settings.evaluate is not None:
        changes["evaluate"] = tuple(parse_source(source).name for source in settings.evaluate)
    return settings.model_copy(update=changes)


def _prunable_layers(model: Any, ignore: Sequence[str]) -> list[list[Any]]:
    import re

    from pipeline.errors import ConfigError
    from stages.budget import LayerShape

    patterns = [re.compile(pattern) for pattern in ignore]
    unused = set(ignore)
    blocks = []
    for index in range(model.num_blocks):
        kept = []
        for layer in model.layers(index):
            matching = [p.pattern for p in patterns if p.search(layer.name)]
            unused.difference_update(matching)
            if not matching:
                kept.append(LayerShape(layer.name, layer.role, layer.rows, layer.cols))
        blocks.append(kept)
    if unused:
        example = model.layers(0)[0].name
        raise ConfigError(f"--ignore {sorted(unused)[0]}: no layer has such a name (they look like {example})")
    if not any(blocks):
        raise ConfigError("--ignore leaves no layer to prune")
    return blocks


def _fixed_sparsities(blocks: Sequence[Sequence[Any]], overrides: Mapping[str, float]) -> dict[str, float]:
    fixed: dict[str, float] = {}
    for pattern, sparsity in overrides.items():
        names = [layer.name for block in blocks for layer in block if re.search(pattern, layer.name)]
        if not names:
            raise ConfigError(f"layer_sparsity {pattern}: no prunable layer has such a name")
        fixed.update(dict.fromkeys(names, sparsity))
    return fixed


def _allocate(blocks: Sequence[Sequence[Any]], config: RunConfig, fixed: Mapping[str, float]) -> tuple[Any, ...]:
    from stages.budget import allocate, follow_pattern

    pattern = config.n_of_m
    if pattern is not None:
        return follow_pattern(blocks, pattern)
    assert config.alpha is not None
    assert config.beta is not None
    return allocate(blocks, config.target_sparsity, config.alpha, config.beta, fixed)


def _check_sources(config: RunConfig, model_path: Path, vocab_size: int) -> dict[str, Any]:
    """The digest of each local source, after making sure that each can be read and is long enough."""
    from stages.data.sources import parse_source
    from stages.data.text import load_tokenizer, require_length

    tokenizer = load_tokenizer(model_path)
    digests: dict[str, Any] = {}
    if config.calibration is not None:
        assert config.num_samples is not None
        source = parse_source(config.calibration)
        is_random = config.calibration_sampling == "random"
        num_windows = 1 if is_random else config.calibration_skip + config.num_samples
        source.check()
        remedy = "lower --num-samples, --calibration-skip or --seqlen, or use more text"
        require_length(source, tokenizer, "calibration", num_windows * config.seqlen + is_random, vocab_size, remedy)
        digests[config.calibration] = source.digest()
    for name in config.evaluate:
        source = parse_source(name)
        source.check()
        remedy = "lower --eval-seqlen or use more text"
        require_length(source, tokenizer, "evaluation", config.eval_seqlen, vocab_size, remedy)
        digests[name] = source.digest()
    return digests


def _model_record(model: Any, folder: Any) -> dict[str, Any]:
    return {
        "name": folder.name,
        "source": folder.source,
        "revision": folder.revision,
        "files": {name: {"size": d.size, "sha256": d.sha256} for name, d in folder.files.items()},
        "model_type": model.name,
        "num_blocks": model.num_blocks,
        "hidden_size": model.hidden_size,
        "max_positions": model.max_positions,
    }


def environment_record(device: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and device choices that decide the last bits."""
    packages = {name: importlib.metadata.version(name) for name in ("lampctl", "torch", "transformers", "zarr")}
    return {"python": platform.python_version(), "packages": packages, "device": dict(device)}


def start(prepared: Prepared, path: Path) -> RunDirectory:
    """The run at `path`: a new one, or the one that is there if it is the same run.

    Raises ConfigMismatch, with the fields that differ, if another run lies there.
    """
    if (path / "run.json").exists():
        run = RunDirectory.open(path)
        require_same(run, prepared)
        return run
    manifest = RunManifest.new(
        created_at=datetime.now(UTC),
        config=prepared.config.model_dump(mode="json"),
        provenance=prepared.origins,
        identity={"settings": prepared.config.identity, "model": prepared.model["files"], "data": prepared.data},
        model=prepared.model,
        environment=prepared.environment,
        budget=[asdict(block) for block in prepared.budget],
        plan=[step.name for step in prepared.steps],
    )
    try:
        return RunDirectory.create(path, manifest)
    except FileExists:  # another process was first
        run = RunDirectory.open(path)
        require_same(run, prepared)
        return run


def require_same(run: RunDirectory, prepared: Prepared) -> None:
    """Raise ConfigMismatch if the run's identity differs from what is asked for now."""
    differing = differing_fields(run.manifest.identity["settings"], prepared.config.identity)
    if run.manifest.identity["model"] != prepared.model["files"]:
        differing["model files"] = ("as they were", "changed since")
    calibration = prepared.config.calibration
    if calibration and run.manifest.identity["data"].get(calibration) != prepared.data.get(calibration):
        differing["calibration text"] = ("as it was", "changed since")
    for name in prepared.config.evaluate:
        _require_same_text(run, name, prepared.data[name])
    if differing:
        lines = [f"  {field}: {old!r} there, {new!r} asked for" for field, (old, new) in differing.items()]
        raise ConfigMismatch(
            f"{run.path} holds another run:\n" + "\n".join(lines) + "\n"
            "use another --run-dir, or the same settings to go on with that run"
        )


def _require_same_text(run: RunDirectory, source: str, digest: Any) -> None:
    """Raise ConfigMismatch if the run has figures of this source that were measured on another text."""
    for commit in run.commits:
        measured = commit.step.startswith("evaluate/") and commit.figures["source"] == source
        if measured and commit.figures["source_digest"] != digest:
            raise ConfigMismatch(
                f"{source} has changed since {run.path} was evaluated on it: give the new text another name, so "
                "that its figures stand beside the old ones"
            )


def require_exported(run: RunDirectory, config: RunConfig) -> None:
    """Raise StepOrderError, naming the step to do first, unless the run has a model to evaluate."""
    todo = next_steps(chain_of(config, run.manifest.model["num_blocks"]), [commit.step for commit in run.commits])
    if todo:
        raise StepOrderError(f"evaluate comes later: do {todo[0].name} first")


def reopen(path: Path) -> tuple[RunDirectory, RunConfig]:
    """A run and its configuration, with the free settings that were last in force."""
    run = RunDirectory.open(path)
    config = RunConfig(**run.manifest.config)
    return run, config.with_free(run.commits[-1].free) if run.commits else config


def change_evaluation(
    run: RunDirectory, config: RunConfig, sources: str | None, seqlen: int | None, max_tokens: int | None
) -> RunConfig:
    """The configuration with other evaluation settings (None: as they are). Raises ConfigError, UsageError."""
    from stages.data.sources import parse_source

    changes: dict[str, Any] = {}
    if sources is not None:
        changes["evaluate"] = [parse_source(name.strip()).name for name in sources.split(",") if name.strip()]
    if seqlen is not None:
        changes["eval_seqlen"] = seqlen
    if max_tokens is not None:
        changes["eval_max_tokens"] = max_tokens
    try:
        changed = config.with_free(changes)
    except ValidationError as error:
        raise ConfigError(explain(error, {})) from error
    check_evaluation(changed, run.manifest.model["max_positions"])
    for name in changed.evaluate:
        source = parse_source(name)
        source.check()
        _require_same_text(run, name, source.digest())
    return changed


def chain_of(config: RunConfig, num_blocks: int) -> tuple[Step, ...]:
    """The steps from calibration to export that a configuration asks for."""
    return chain(config.method, num_blocks, bool(config.refine))


def steps_of(run: RunDirectory, config: RunConfig) -> tuple[tuple[Step, ...], dict[str, Evaluation]]:
    """All steps of a run under `config`, and what each evaluate step measures, by step name."""
    evaluations = evaluation_steps(config.evaluate, config.eval_seqlen, config.eval_max_tokens, config.evaluate_dense)
    steps = chain_of(config, run.manifest.model["num_blocks"])
    return (*steps, *(step for step, _ in evaluations)), {step.name: what for step, what in evaluations}


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether nothing is left to do."""
    return not next_steps(steps_of(run, config)[0], [commit.step for commit in run.commits])


def go_on(
    run: RunDirectory,
    config: RunConfig,
    listener: Listener,
    stop: StopRequest,
    *,
    until: Callable[[Step], bool] = lambda step: False,
    shared_with: RunDirectory | None = None,
) -> None:
    """Do what is left of a run, up to and with a step for which `until` holds."""
    steps, evaluations = steps_of(run, config)
    if not next_steps(steps, [commit.step for commit in run.commits]) and run.is_published("model"):
        return
    from pipeline.work import StageWorker
    from stages import device

    worker = StageWorker(run, config, evaluations, shared_with)
    for change in environment_changes(run):
        listener.warn(change)
    device.apply(worker.choices)
    advance(run, steps, worker, config.free, listener, stop, until)


def environment_changes(run: RunDirectory) -> list[str]:
    """How this machine differs from the one that the run began on, one sentence each."""
    began, now = run.manifest.environment, environment_record({})
    began = {**began, "packages": {**began["packages"], "python": began["python"]}}
    now = {**now, "packages": {**now["packages"], "python": now["python"]}}
    return [
        f"{name} is {now['packages'][name]} here, the run began with {version}: the result may differ in its last bits"
        for name, version in began["packages"].items()
        if now["packages"].get(name) != version
    ]


def newest_unfinished(root: Path = RUNS) -> Path | None:
    """The run under `root` that was begun last and is not finished; None if all are. Raises RunNotFound."""
    found = find_runs(root)
    for path in found:
        try:
            run, config = reopen(path)
        except (DamagedData, ConfigMismatch) as error:
            log.warning("passing over %s: %s", path, error)
            continue
        if not is_finished(run, config):
            return path
    if not found:
        raise RunNotFound(
            f"there are no runs under {root}/: begin one with lampctl run, or name one that lies elsewhere"
        )
    return None
