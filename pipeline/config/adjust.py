"""Adjust gathered settings: to another method, to absolute paths, to the kind of model that is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config.completion import BASELINE
from pipeline.config.declarations import flag_of
from pipeline.config.gather import Gathered
from pipeline.config.run_config import DISTILL_FIELDS, LAMP_FIELDS
from pipeline.errors import ConfigError
from stages.pruners.registry import LAMP, method_names

if TYPE_CHECKING:
    from stages.models.base import BlockModel


def sibling(gathered: Gathered, method: str) -> Gathered:
    """The same settings for another method, as a baseline. Settings that only the first method uses are dropped.

    A baseline is distilled only where that is its default, and the user has not said --no-distill.

    Raises:
        ConfigError: There is no such method.
    """
    if method not in method_names():
        raise ConfigError(f"--baseline {method}: choose one of {', '.join(method_names())}")
    dropped = {"alpha", "beta", *DISTILL_FIELDS, *(() if method == LAMP else LAMP_FIELDS)}
    if gathered.values.distill:
        dropped.add("distill")
    changes: dict[str, Any] = dict.fromkeys(dropped)
    values = gathered.values.changed(**{**changes, "method": method, "evaluate_dense": False})
    origins = {name: origin for name, origin in gathered.origins.items() if name not in dropped}
    return Gathered(values, {**origins, "method": BASELINE}, gathered.preset)


def with_absolute_paths(gathered: Gathered) -> Gathered:
    """The settings with local paths made absolute, since a run can be resumed from another folder."""
    from stages.data.registry import parse_source
    from stages.formats.file_digest import local_path, real_path

    settings = gathered.values
    changes: dict[str, Any] = {}
    if local_path(settings.model).exists():
        changes["model"] = str(real_path(settings.model))
    if settings.from_run == "":
        raise ConfigError("--from-run is empty: expected a run directory")
    if settings.from_run is not None and "://" not in settings.from_run:
        changes["from_run"] = str(local_path(settings.from_run).resolve())
    if settings.calibration is not None:
        changes["calibration"] = parse_source(settings.calibration).name
    if settings.evaluate is not None:
        changes["evaluate"] = tuple(parse_source(source).name for source in settings.evaluate)
    return Gathered(settings.changed(**changes), gathered.origins, gathered.preset)


def adjusted_to(gathered: Gathered, model: BlockModel) -> Gathered:
    """The settings with what this model decides: the tokens per sample, and the kind of data.

    Raises:
        ConfigError: The user gave a number of tokens, and every sample of this model has the same.
    """
    return _without_foreign_data(_with_fixed_samples(gathered, model), model)


def _with_fixed_samples(gathered: Gathered, model: BlockModel) -> Gathered:
    """The settings with the number of tokens in every sample of this model, if that number is fixed."""
    from stages.tasks.registry import model_for, task_named

    if model.fixed_tokens is None:
        return gathered
    for field in ("seqlen", "eval_seqlen", "eval_max_tokens"):
        if gathered.given(field):
            raise ConfigError(
                f"{flag_of(field)}: every sample of {model.source.name} has {model.fixed_tokens} patches; leave it out"
            )
    fixed = {"seqlen": model.fixed_tokens, "eval_seqlen": model.fixed_tokens, "eval_max_tokens": None}
    usual = task_named(model.task).default_points
    if usual is None and gathered.given("eval_points"):
        raise ConfigError(
            f"{flag_of('eval_points')}: {model.source.name} is {model_for(model.task)}; points are about segmentation "
            "masks"
        )
    points = gathered.values.eval_points or usual
    values = gathered.values.changed(**fixed, eval_points=points)
    return Gathered(values, gathered.origins, gathered.preset)


def _without_foreign_data(gathered: Gathered, model: BlockModel) -> Gathered:
    """The settings without the data that a preset names for another kind of model."""
    from stages.data.registry import parse_source
    from stages.tasks.registry import task_named

    settings, contents = gathered.values, task_named(model.task).contents
    named = {"calibration": (settings.calibration,), "evaluate": settings.evaluate}
    foreign = [
        field
        for field, names in named.items()
        if not gathered.given(field) and any(parse_source(name).contents != contents for name in names or () if name)
    ]
    return Gathered(settings.changed(**dict.fromkeys(foreign)), gathered.origins, gathered.preset)
