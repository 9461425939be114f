"""Fill in the settings that were not given, knowing the model, and refuse combinations that exclude each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config.gather import Gathered
from pipeline.config.run_config import CALIBRATION_FIELDS, LAMP_FIELDS, RunConfig
from pipeline.config.settings import flag_of
from pipeline.errors import ConfigError
from stages.metrics.harness_tasks import LAYOUT
from stages.pruners.registry import LAMP, PAPER_PRUNER, PRUNERS, bit_methods, method_title, reads_data
from stages.tasks.base import Task
from stages.training.presets import TrainingDefaults

BASELINE = "baseline"  # the origin of a baseline's method


def check_combinations(gathered: Gathered) -> None:
    """Raise ConfigError for settings that exclude each other, with both of their names."""
    settings = gathered.values

    def origin(field: str) -> str:
        where = gathered.origins.get(field, "flag")
        return "" if where == "flag" else f" ({where})"

    if settings.pattern is None and settings.sparsity is None:
        raise ConfigError("--sparsity is missing, or --pattern N:M instead (lampctl run --help has examples)")
    if settings.pattern is not None:
        for field in ("sparsity", "alpha", "beta", "layer_sparsity", "budget", "budget_spread"):
            if getattr(settings, field) not in (None, {}):
                raise ConfigError(
                    f"--pattern {settings.pattern}{origin('pattern')} fixes the sparsity of every group of every "
                    f"layer: it excludes {flag_of(field)}{origin(field)}"
                )
    if settings.budget == "outliers" and not reads_data(settings.method):
        is_baseline = gathered.origins.get("method") == BASELINE
        remedy = f"; leave out --baseline {settings.method}" if is_baseline else ""
        title = method_title(settings.method)
        raise ConfigError(f"--budget outliers{origin('budget')}: {title} pruning reads no data{remedy}")
    if settings.budget_spread is not None and settings.budget != "outliers":
        where = f"{settings.budget_spread:g}{origin('budget_spread')}"
        raise ConfigError(f"--budget-spread {where} requires --budget outliers")
    if settings.group_size is not None and settings.bits is None:
        raise ConfigError(f"--group-size {settings.group_size}{origin('group_size')} requires --bits")
    if settings.bits is not None and settings.method not in bit_methods():
        is_baseline = gathered.origins.get("method") == BASELINE
        remedy = f"leave out --baseline {settings.method}" if is_baseline else f"use --method {_any_of(bit_methods())}"
        title = method_title(settings.method)
        raise ConfigError(f"--bits {settings.bits}{origin('bits')}: {title} pruning cannot quantize; {remedy}")
    flag, name = ("--pruner", settings.pruner) if settings.method == LAMP else ("--method", settings.method)
    if name is not None and settings.bits is not None and not PRUNERS.get(name).supports_bits:
        where = f"--bits {settings.bits}{origin('bits')}"
        raise ConfigError(f"{where}: {method_title(name)} pruning cannot quantize; use another {flag}")
    if name is not None and settings.pattern is not None and not PRUNERS.get(name).supports_pattern:
        where = f"--pattern {settings.pattern}{origin('pattern')}"
        raise ConfigError(f"{where}: {method_title(name)} pruning does not support N:M patterns; use another {flag}")
    if settings.effort is not None and gathered.preset == "paper":
        raise ConfigError(f"--effort {settings.effort}{origin('effort')}: --preset paper fixes the training")
    if settings.refine is False:
        for field in ("refine_epochs", "refine_lr"):
            if getattr(settings, field) is not None:
                raise ConfigError(f"--no-refine{origin('refine')} excludes {flag_of(field)}{origin(field)}")


def complete(
    gathered: Gathered,
    max_positions: int | None,
    defaults: TrainingDefaults,
    task: Task,
    baselines: Sequence[str] = (),
) -> tuple[RunConfig, dict[str, str], list[str]]:
    """Fill in what nobody gave. Gives the configuration, each field's origin, and notices for the user.

    task: what a model of this kind is calibrated on and measured by, unless somebody says. baselines: methods that
    take the same settings beside this run; what one of them uses is worth no notice.

    `defaults.alpha` and `.beta` must be feasible already, and the combination checked. Raises ConfigError where the
    model cannot do what was asked for.
    """
    settings, notices = gathered.values, []
    values, origins = asdict(settings), dict(gathered.origins)

    def fill(field: str, value: Any) -> None:
        if values[field] is None:
            values[field] = value

    fill("seqlen", 2048)
    if max_positions is not None and values["seqlen"] > max_positions:
        if gathered.given("seqlen"):
            raise ConfigError(
                f"--seqlen {values['seqlen']}: {settings.model} has {max_positions} positions; "
                f"use --seqlen {max_positions} or less"
            )
        notices.append(f"seqlen is {max_positions}, all the positions that {settings.model} has")
        values["seqlen"] = max_positions
    fill("eval_seqlen", values["seqlen"])
    is_lamp, uses_calibration = settings.method == LAMP, reads_data(settings.method)
    if settings.pattern is None:
        fill("alpha", defaults.alpha if is_lamp else 1.0)
        fill("beta", defaults.beta if is_lamp else 0.0)
        fill("budget", "uniform")
        if values["budget"] == "outliers":
            fill("budget_spread", 0.05)
    if is_lamp and values["refine"] is None and (values["refine_epochs"] or values["refine_lr"]):
        values["refine"] = True
    if is_lamp and values["bits"] is not None:
        joint = PRUNERS.get(defaults.pruner).quantizes_jointly
        fill("pruner", defaults.pruner if joint else PAPER_PRUNER)
    for field in LAMP_FIELDS:
        if is_lamp:
            fill(field, getattr(defaults, field))
        else:
            _drop(field, gathered, values, [] if "lamp" in baselines else notices, "only --method lamp uses it")
    if is_lamp and gathered.preset == "paper":
        fixed = ("alpha", "beta", *(field for field in LAMP_FIELDS if field != "effort"))
        others = [
            flag_of(field) for field in fixed if gathered.given(field) and values[field] != getattr(defaults, field)
        ]
        if others:
            notices.append(f"{', '.join(others)}: this departs from the paper's settings (--preset paper)")
    if is_lamp and not values["refine"]:
        values["refine_epochs"] = values["refine_lr"] = None
        if not values["epochs"]:
            raise ConfigError(f"--epochs 0 without --refine trains nothing: that is --method {values['pruner']}")
    if uses_calibration:
        fill("calibration", task.default_calibration)
        if values["calibration"] is None:
            raise ConfigError(task.missing_calibration)
        fill("num_samples", 128)
        fill("calibration_sampling", task.default_sampling(values["calibration"]))
    else:
        for field in CALIBRATION_FIELDS:
            reason = f"{method_title(settings.method)} pruning reads no data"
            _drop(field, gathered, values, [] if baselines else notices, reason)
        values["calibration_skip"] = 0
    if values["evaluate"] is None and task.missing_evaluation is not None:
        notices.append(task.missing_evaluation)
    fill("evaluate", task.default_evaluation)
    fill("tasks", usual_tasks(values["task_data"], values["task_limit"]))
    for field in values:
        origins.setdefault(field, "default")
    config = RunConfig.of(values, origins)
    check_evaluation(config, max_positions)
    return config, origins, notices


def usual_tasks(task_data: str | None, task_limit: int | None) -> tuple[str, ...]:
    """The tasks where nobody named any: none, unless something was said about their rows."""
    return () if task_data is None and task_limit is None else tuple(LAYOUT)


def check_evaluation(config: RunConfig, max_positions: int | None) -> None:
    """Raise ConfigError where the evaluation settings do not fit the model or each other."""
    if max_positions is not None and config.eval_seqlen > max_positions:
        raise ConfigError(f"--eval-seqlen {config.eval_seqlen}: the model has {max_positions} positions")
    if config.eval_max_tokens is not None and config.eval_max_tokens < config.eval_seqlen:
        raise ConfigError(
            f"--eval-max-tokens {config.eval_max_tokens} is less than one window of {config.eval_seqlen} tokens"
        )


def _any_of(names: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _drop(field: str, gathered: Gathered, values: dict[str, Any], notices: list[str], reason: str) -> None:
    if gathered.given(field):
        notices.append(f"--{field.replace('_', '-')} has no effect: {reason}")
    values[field] = None
