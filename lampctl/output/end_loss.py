"""How far the outputs of pruned models are from the original's, in sentences: of a run, and beside its baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lampctl.output.console import shown_path
from pipeline.config.checks import SEARCHED
from pipeline.config.declarations import flag_of
from pipeline.config.run_config import RunConfig
from pipeline.runs.status import RunStatus
from pipeline.steps.end_loss_result import EndLossResult
from stages.pruners.registry import method_title
from stages.training.rates import Rate

# A loss that is higher by less than this share may be so by chance.
_CHANCE = 1.01


def end_loss_lines(states: Sequence[RunStatus]) -> list[str]:
    """One line for the end loss of a run; with baselines one line for all that were measured on the same samples.

    states: of the run, then of its baselines.
    """
    measured = [(state, state.end_loss) for state in states if state.end_loss is not None]
    lines: list[str] = []
    while measured:
        first = measured[0][1]
        alike = [(state, found) for state, found in measured if first.is_comparable(found)]
        measured = [pair for pair in measured if pair not in alike]
        if len(states) == 1:
            lines.append(f"{first.title}: {first.text} {first.measured_on}")
        elif len({found.measured_on for _, found in alike}) == 1:
            values = ", ".join(f"{method_title(state.config.method)} {found.text}" for state, found in alike)
            lines.append(f"{first.title} {first.measured_on}: {values}")
        else:  # one method has seen samples that the other has not
            values = "; ".join(
                f"{method_title(state.config.method)} {found.text} {found.measured_on}" for state, found in alike
            )
            lines.append(f"{first.title}: {values}")
    return lines


def worse_than_baselines(states: Sequence[RunStatus]) -> list[str]:
    """A sentence for each baseline whose end loss is lower than the run's. states: of the run, then its baselines."""
    main, *baselines = states
    ours = main.end_loss
    if ours is None:
        return []
    sentences = []
    for state in baselines:
        theirs = state.end_loss
        if theirs is None or not ours.is_comparable(theirs) or _value(ours) <= _value(theirs):
            continue
        us, them = method_title(main.config.method), method_title(state.config.method)
        remedies = [f"use {them}'s model in {shown_path(state.model)}"] if state.model is not None else []
        if rates := _learning_rates(main.config):
            remedies.insert(0, f"try a smaller learning rate ({', '.join(rates)}; with another --run-dir)")
        figures = f"{ours.title} {ours.text} against {theirs.text} {ours.measured_on}"
        if _value(ours) <= _CHANCE * _value(theirs):
            sentences.append(f"{us} is no better than {them} here: {figures}; more samples (--num-samples) would tell")
        else:
            sentences.append(f"{us} is worse than {them} here: {figures}; " + ", or ".join(remedies))
    return sentences


def _learning_rates(config: RunConfig) -> list[str]:
    """The flags of the learning rates that a run was trained with, and their values."""
    used = {
        "lr": config.is_lamp and config.epochs,
        "refine_lr": config.refine,
        "distill_lr": config.distill and config.distill_lr != SEARCHED,
    }
    return [f"{flag_of(name)} below {Rate.parse(getattr(config, name))}" for name, is_used in used.items() if is_used]


def _value(found: EndLossResult) -> float:
    return math.inf if found.value is None else found.value
