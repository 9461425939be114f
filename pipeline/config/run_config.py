"""A run's configuration: the settings with every default filled in, as run.json keeps it.

`pipeline.config.gather` merges what the user gave; `pipeline.config.completion` fills in the rest for the model.
Identity settings decide the weights: another value in the same run directory is refused. Runtime settings may change at
any resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.declarations import GivenSettings, names_where, with_current_names
from pipeline.config.pruning_settings import Tokens
from pipeline.config.settings import Settings
from stages.metrics.base import EvaluationProtocol
from stages.pruners.base import PruneOptions
from stages.pruners.registry import LAMP, PAPER_PRUNER, reads_data

if TYPE_CHECKING:
    from pydantic import JsonValue

RUNTIME_FIELDS = names_where(scope="runtime")
LAMP_FIELDS = names_where(applies_to="lamp")
DISTILL_FIELDS = ("distill_epochs", "distill_lr", "distill_batch", "distill_samples", "distill_generated", "from_run")
# LAMP's, and those of a distillation after any method.
DISTILLATION_TOO = ("effort", "held_out")
CALIBRATION_FIELDS = names_where(applies_to="methods with data")
DRAWING_FIELDS = names_where(draws_samples=True)  # select the calibration samples within a data source


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """`Settings` with every default filled in.

    A setting that the method does not use is None: a magnitude run has no calibration, only LAMP has epochs.
    """

    # Not checked against the registries: a run stays readable after the package of a pruner or metric is uninstalled.
    method: str = LAMP
    pruner: str | None = None
    metrics: tuple[str, ...] = ()
    seqlen: Tokens
    # Default: runs of versions without this setting.
    bos: Literal["auto", "stream", "window", "none"] | None = "stream"
    evaluate: tuple[str, ...] = ()
    eval_seqlen: Tokens
    tasks: tuple[str, ...] = ()

    @property
    def is_lamp(self) -> bool:
        """Whether the method is LAMP: blocks are compensated, and may be refined."""
        return self.method == LAMP

    @property
    def has_calibration_set(self) -> bool:
        """Whether a step reads one: a method without data needs it only to distill on it."""
        if self.calibration is None:
            return False
        return not self.distill or self.distill_samples is None or reads_data(self.method)

    @property
    def pruner_name(self) -> str:
        """The pruner of the blocks (`stages.pruners.registry.PRUNERS`)."""
        return self.pruner or (PAPER_PRUNER if self.is_lamp else self.method)

    @property
    def prune_options(self) -> PruneOptions:
        """The options of the pruner."""
        return PruneOptions(
            self.damping,
            self.column_block,
            self.n_of_m,
            self.bits,
            self.group_size,
            self.seed,
            bool(self.moe_calibrate_all_experts),
        )

    @property
    def goal(self) -> str:
        """Sparsity and quantization for people: "70%", "2:4, int4". Layers with a sparsity of their own left out."""
        return self.goal_at(self.target_sparsity)

    def goal_at(self, sparsity: float) -> str:
        """The goal of a run whose budget comes to this sparsity over all layers."""
        what = self.pattern or f"{100 * sparsity:g}%"
        grouped = f" in groups of {self.group_size}" if self.group_size else ""
        return what + (f", int{self.bits}{grouped}" if self.bits else "")

    @property
    def slug(self) -> str:
        """Sparsity and quantization for file names: "s70", "2of4-int4"."""
        what = self.pattern.replace(":", "of") if self.pattern else f"s{100 * self.target_sparsity:g}"
        grouped = f"g{self.group_size}" if self.group_size else ""
        return what + (f"-int{self.bits}{grouped}" if self.bits else "")

    @property
    def evaluation_protocol(self) -> EvaluationProtocol:
        """How the model is measured."""
        return EvaluationProtocol(
            self.eval_seqlen,
            self.eval_max_tokens,
            self.eval_points,
            self.eval_max_images,
            self.decided_bos,
            self.chat_template,
        )

    @property
    def decided_bos(self) -> Literal["stream", "window", "none"]:
        """Where BOS stands as far as the settings say it. With "auto" it is measured later; until then "stream"."""
        return "stream" if self.bos is None or self.bos == "auto" else self.bos

    def with_runtime(self, settings: GivenSettings) -> RunConfig:
        """This configuration with other runtime settings. Raises ConfigError for a wrong one."""
        return RunConfig.of({**self.as_json(), **settings})

    @property
    def runtime(self) -> dict[str, JsonValue]:
        """The runtime settings, ready for JSON."""
        return {name: value for name, value in self.as_json().items() if name in RUNTIME_FIELDS}

    @property
    def identity(self) -> dict[str, JsonValue]:
        """The settings that decide the weights, ready for JSON."""
        return {name: value for name, value in self.as_json().items() if name not in RUNTIME_FIELDS}


def with_recorded_defaults(config: RunConfig, origins: Mapping[str, str], recorded: Recorded) -> RunConfig:
    """The configuration with the run's own value of every setting that was a default then and is one now.

    Defaults change between versions. A run keeps the defaults that it began with. Only a value that the user gave can
    differ from the run's.

    Args:
        config: The configuration of the current command.
        origins: Where each of its values came from.
        recorded: The configuration that the run began with.
    """
    changes = {
        name: getattr(recorded.config, name)
        for name in config.identity
        if origins.get(name, "default") == "default" and recorded.origins.get(name, "default") == "default"
    }
    return config.changed(**changes)


def as_in_origin(config: RunConfig, origins: Mapping[str, str], origin: Recorded) -> RunConfig:
    """The configuration of a run that takes over the blocks of another, with that run's own defaults.

    Settings of distillation stay.
    """
    changed = with_recorded_defaults(config, origins, origin)
    return changed.changed(**{name: getattr(config, name) for name in settings_of_distillation(origin.config)})


def settings_of_distillation(origin: RunConfig) -> tuple[str, ...]:
    """The settings in which a run that takes over the blocks of another may differ: its blocks depend on none of them.

    origin: The configuration of the other run. Its calibration set is None if its method reads no data.
    """
    names: tuple[str, ...] = ("distill", *DISTILL_FIELDS)
    if not origin.is_lamp:
        names += DISTILLATION_TOO
    return names if origin.calibration is not None else (*names, *CALIBRATION_FIELDS, "calibration_skip", "seqlen")


@dataclass(frozen=True)
class Recorded:
    """The configuration that a run began with, and where each value came from."""

    config: RunConfig
    origins: Mapping[str, str]


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings with different values, as {name: (value of the run, value given now)}. Accepts former names."""
    old = with_current_names(old)
    return {field: (old.get(field), new.get(field)) for field in {**old, **new} if old.get(field) != new.get(field)}
