"""Fill in the settings that the user left out, for the given model. Refuse settings that exclude each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from pipeline.config.checks import SEARCHED
from pipeline.config.choices import any_of
from pipeline.config.declarations import flag_of
from pipeline.config.gather import Gathered
from pipeline.config.run_config import CALIBRATION_FIELDS, DISTILL_FIELDS, DISTILLATION_TOO, LAMP_FIELDS, RunConfig
from pipeline.errors import ConfigError
from stages.metrics.harness_tasks import LAYOUT
from stages.pruners.registry import LAMP, PAPER_PRUNER, PRUNERS, bit_methods, method_title, reads_data
from stages.tasks.base import Task
from stages.training.presets import DEFAULT_EFFORT, TrainingDefaults, distillation

NUM_SAMPLES = 128  # of the calibration set, as in the paper
SEQLEN = 2048  # tokens of a sample
BASELINE = "baseline"  # the origin of a baseline's method


def check_combinations(gathered: Gathered) -> None:
    """Raise ConfigError, with both names, for settings that exclude each other."""
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
        remedy = f"leave out --baseline {settings.method}" if is_baseline else f"use --method {any_of(bit_methods())}"
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
    if settings.distill is False:
        for field in DISTILL_FIELDS:
            if getattr(settings, field) not in (None, 0):
                raise ConfigError(f"--no-distill{origin('distill')} excludes {flag_of(field)}{origin(field)}")


class Completed(NamedTuple):
    """A configuration with every default filled in, each field's origin, and notices for the user."""

    config: RunConfig
    origins: dict[str, str]
    notices: list[str]


def complete(
    gathered: Gathered,
    max_positions: int | None,
    defaults: TrainingDefaults,
    task: Task,
    baselines: Sequence[str] = (),
) -> Completed:
    """Fill in every setting that the user left out.

    Args:
        gathered: What the user gave; `check_combinations` has passed.
        max_positions: Longest sequence of the model, in tokens. None: no limit.
        defaults: How LAMP trains; alpha and beta must be feasible.
        task: Gives the default data sources of this kind of model.
        baselines: Methods that run beside this one with the same settings. A setting that one of them uses is not
            reported as unused.

    Raises:
        ConfigError: The model cannot do what was asked for.
    """
    draft = _Draft(gathered, baselines)
    _fill_windows(draft, max_positions)
    _fill_budget(draft, defaults)
    _fill_training(draft, defaults)
    _fill_distillation(draft, defaults)
    _fill_bos(draft, task)
    _fill_calibration(draft, task)
    _fill_evaluation(draft, task)
    for field in draft.values:
        draft.origins.setdefault(field, "default")
    config = RunConfig.of(draft.values, draft.origins)
    check_evaluation(config, max_positions)
    return Completed(config, draft.origins, draft.notices)


class _Draft:
    """The settings while defaults are filled in."""

    def __init__(self, gathered: Gathered, baselines: Sequence[str]) -> None:
        self.gathered, self.baselines = gathered, baselines
        self.settings = gathered.values
        self.values = asdict(gathered.values)
        self.origins = dict(gathered.origins)
        self.notices: list[str] = []
        self.is_lamp = gathered.values.method == LAMP

    def fill(self, field: str, value: Any) -> None:
        """Set a setting that has no value yet."""
        if self.values[field] is None:
            self.values[field] = value

    def drop(self, field: str, reason: str, *, is_reported: bool) -> None:
        """Remove a setting that this method does not use."""
        if self.gathered.given(field) and is_reported:
            flag = flag_of(field)
            given = f"--no-{flag.removeprefix('--')}" if self.values[field] is False else flag
            self.notices.append(f"{given} has no effect: {reason}")
        self.values[field] = None


def _fill_windows(draft: _Draft, max_positions: int | None) -> None:
    """Tokens per sample and per evaluation window, within the model's limit."""
    values, model = draft.values, draft.settings.model
    draft.fill("seqlen", SEQLEN)
    if max_positions is not None and values["seqlen"] > max_positions:
        if draft.gathered.given("seqlen"):
            raise ConfigError(
                f"--seqlen {values['seqlen']}: {model} has {max_positions} positions; use --seqlen {max_positions} "
                "or less"
            )
        draft.notices.append(f"seqlen is {max_positions}, all the positions that {model} has")
        values["seqlen"] = max_positions
    draft.fill("eval_seqlen", values["seqlen"])


def _fill_budget(draft: _Draft, defaults: TrainingDefaults) -> None:
    """How the sparsity is distributed; a pattern leaves nothing to distribute."""
    if draft.settings.pattern is not None:
        return
    draft.fill("alpha", defaults.alpha if draft.is_lamp else 1.0)
    draft.fill("beta", defaults.beta if draft.is_lamp else 0.0)
    draft.fill("budget", "uniform")
    if draft.values["budget"] == "outliers":
        draft.fill("budget_spread", 0.05)


def _fill_training(draft: _Draft, defaults: TrainingDefaults) -> None:
    """How LAMP trains; other methods do not."""
    if not draft.is_lamp:
        for field in LAMP_FIELDS:
            if field not in DISTILLATION_TOO:
                draft.drop(field, "only --method lamp uses it", is_reported=LAMP not in draft.baselines)
        return
    values = draft.values
    if values["refine"] is None and (values["refine_epochs"] or values["refine_lr"]):
        values["refine"] = True
    if values["bits"] is not None:
        joint = PRUNERS.get(defaults.pruner).quantizes_jointly
        draft.fill("pruner", defaults.pruner if joint else PAPER_PRUNER)
    if values["refine"] is False:  # then compensation alone has the whole budget
        draft.fill("epochs", max(defaults.epochs, defaults.refine_epochs))
    for field in LAMP_FIELDS:
        draft.fill(field, getattr(defaults, field))
    if draft.gathered.preset == "paper":
        fixed = ("alpha", "beta", *(field for field in LAMP_FIELDS if field != "effort"))
        others = [
            flag_of(field)
            for field in fixed
            if draft.gathered.given(field) and values[field] != getattr(defaults, field)
        ]
        if others:
            draft.notices.append(f"{', '.join(others)}: this departs from the paper's settings (--preset paper)")
    if not values["refine"]:
        values["refine_epochs"] = values["refine_lr"] = None
        if not values["epochs"]:
            raise ConfigError(f"--epochs 0 without --refine trains nothing: that is --method {values['pruner']}")


def _fill_distillation(draft: _Draft, defaults: TrainingDefaults) -> None:
    """Whether and how all blocks are trained together at the end."""
    values = draft.values
    asking = [flag_of(field) for field in ("distill", *DISTILL_FIELDS) if values[field]]
    is_default = defaults.distill and draft.is_lamp
    if values["distill"] is None and asking:  # one says it all
        values["distill"] = True
        if not is_default and draft.gathered.preset != "paper":
            draft.notices.append(f"{', '.join(asking)}: the model is distilled at the end, as by --distill")
    draft.fill("distill", is_default)
    if not values["distill"]:
        values["distill_generated"] = None  # 0 asks for nothing more
        if not draft.is_lamp:
            reason = "only --method lamp and distillation use it"
            for field in DISTILLATION_TOO:
                draft.drop(field, reason, is_reported=LAMP not in draft.baselines)
        return
    if draft.gathered.preset == "paper":
        draft.notices.append(f"{', '.join(asking)}: this departs from the paper's settings (--preset paper)")
    draft.fill("distill_samples", defaults.distill_samples)
    num_samples = values["distill_samples"] or values["num_samples"] or NUM_SAMPLES
    draft.fill("distill_generated", num_samples if draft.is_lamp and defaults.distill_generates else 0)
    epochs, batch = distillation(values["effort"] or DEFAULT_EFFORT, num_samples + values["distill_generated"])
    draft.fill("distill_epochs", epochs)
    draft.fill("distill_batch", batch)
    draft.fill("distill_lr", SEARCHED)


def _fill_calibration(draft: _Draft, task: Task) -> None:
    """The calibration set, for methods that read data, and for distillation."""
    values, method = draft.values, draft.settings.method
    if not reads_data(method) and not values["distill"]:
        for field in CALIBRATION_FIELDS:
            draft.drop(field, f"{method_title(method)} pruning reads no data", is_reported=not draft.baselines)
        values["calibration_skip"] = 0
        return
    draft.fill("calibration", task.default_calibration)
    if values["calibration"] is None:
        raise ConfigError(task.missing_calibration)
    draft.fill("num_samples", NUM_SAMPLES)
    if values["distill_samples"] == values["num_samples"]:
        values["distill_samples"] = None
    draft.fill("calibration_sampling", task.default_sampling(values["calibration"]))
    if reads_data(method) or values["distill_samples"] is None:
        draft.fill("end_loss", True)
    else:
        draft.drop("end_loss", "there is no calibration set, only samples to distill on", is_reported=True)


def _fill_bos(draft: _Draft, task: Task) -> None:
    """Where BOS stands, for models that read text."""
    if task.reads_text:
        draft.fill("bos", "auto")
    else:
        draft.drop("bos", f"{task.title} models read no text", is_reported=True)


def _fill_evaluation(draft: _Draft, task: Task) -> None:
    """What the pruned model is measured on."""
    values = draft.values
    if values["evaluate"] is None and task.missing_evaluation is not None:
        draft.notices.append(task.missing_evaluation)
    draft.fill("evaluate", task.default_evaluation)
    draft.fill("tasks", usual_tasks(values["task_data"], values["task_limit"]))


def usual_tasks(task_data: str | None, task_limit: int | None) -> tuple[str, ...]:
    """The zero-shot tasks if --tasks is not given: the usual seven with --task-data or --task-limit, else none."""
    return () if task_data is None and task_limit is None else tuple(LAYOUT)


def check_evaluation(config: RunConfig, max_positions: int | None) -> None:
    """Raise ConfigError where the evaluation settings do not fit the model or each other."""
    if max_positions is not None and config.eval_seqlen > max_positions:
        raise ConfigError(f"--eval-seqlen {config.eval_seqlen}: the model has {max_positions} positions")
    if config.eval_max_tokens is not None and config.eval_max_tokens < config.eval_seqlen:
        raise ConfigError(
            f"--eval-max-tokens {config.eval_max_tokens} is less than one window of {config.eval_seqlen} tokens"
        )
