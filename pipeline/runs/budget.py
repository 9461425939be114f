"""The budget of a run: which layers may be pruned, feasible alpha and beta, weights to mask per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from pipeline.config.run_config import RunConfig
from pipeline.config.settings import Settings
from pipeline.errors import ConfigError
from pipeline.steps.stage_settings import fixed_sparsities, prunable_layers

if TYPE_CHECKING:
    from stages.models.base import BlockModel
    from stages.sparsity.budget import BlockBudget, LayerShape
    from stages.training.presets import TrainingDefaults


@dataclass(frozen=True)
class PrunableLayers:
    """The layers that may be pruned.

    Attributes:
        blocks: Layers of each block.
        fixed: Sparsity of each layer, by name, that has one of its own.
        vital: Names of the layers that stay dense for their role, by the last part of their path.
    """

    blocks: Sequence[Sequence[LayerShape]]
    fixed: Mapping[str, float]
    vital: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, model: BlockModel, settings: Settings) -> Self:
        """The layers of this model with --ignore, layer_sparsity and --group-size applied.

        Raises:
            ConfigError: One of these settings matches no layer, a group is wider than every layer, or a setting for
                experts meets a model without them.
        """
        layers = (layer for index in range(model.num_blocks) for layer in model.layers(index))
        if settings.moe_calibrate_all_experts and not any(layer.peers is not None for layer in layers):
            raise ConfigError(f"--moe-calibrate-all-experts: {settings.model} is no mixture of experts; leave it out")
        blocks = prunable_layers(model, settings.ignore, prune_all=settings.prune_all)
        widest = max(layer.cols for block in blocks for layer in block)
        if settings.group_size is not None and settings.group_size > widest:
            raise ConfigError(
                f"--group-size {settings.group_size}: no layer has more than {widest} columns; leave it out"
            )
        return cls(blocks, fixed_sparsities(blocks, settings.layer_sparsity), _vital(model, blocks))

    @property
    def free(self) -> list[list[LayerShape]]:
        """The layers of each block that share the run's sparsity."""
        return [[layer for layer in block if layer.name not in self.fixed] for block in self.blocks]

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the layers that stay dense."""
        if not self.vital:
            return ()
        count = sum(len(names) for names in self.vital.values())
        return (
            f"{count} small layers stay dense and do not count towards the sparsity: {', '.join(self.vital)} steer "
            "whole blocks; --prune-all prunes them, too",
        )


def _vital(model: BlockModel, blocks: Sequence[Sequence[LayerShape]]) -> dict[str, list[str]]:
    """Names of the layers with the role "vital" that are not among those to prune, by the last part of their path."""
    from stages.models.layer_roles import VITAL

    kept = {layer.name for block in blocks for layer in block}
    found: dict[str, list[str]] = {}
    for index in range(model.num_blocks):
        for layer in model.layers(index):
            if layer.role == VITAL and layer.name not in kept:
                found.setdefault(layer.path.rpartition(".")[2], []).append(layer.name)
    return found


def feasible_defaults(
    layers: PrunableLayers, settings: Settings, defaults: TrainingDefaults
) -> tuple[TrainingDefaults, tuple[str, ...]]:
    """The defaults with alpha and beta that fit the layers (LAMP Eqs. 1-4), and a notice for each that changed.

    A value that the user gave is kept; `allocate_budget` refuses it if no budget fits.
    """
    from stages.sparsity.budget import feasible_alpha, feasible_beta

    free, sparsity = layers.free, settings.target_sparsity
    alpha, beta = settings.alpha, settings.beta
    if beta is None:
        beta = feasible_beta(free, sparsity, 1.0 if alpha is None else alpha, defaults.beta)
    if alpha is None:
        alpha = feasible_alpha(free, sparsity, defaults.alpha, beta)
    notices = tuple(
        f"{name} is {value:.4g} instead of {default:.4g}: no layer can be pruned above 100%"
        for name, value, default in (("alpha", alpha, defaults.alpha), ("beta", beta, defaults.beta))
        if getattr(settings, name) is None and value != default
    )
    return replace(defaults, alpha=alpha, beta=beta), notices


def allocate_budget(layers: PrunableLayers, config: RunConfig) -> tuple[BlockBudget, ...]:
    """The number of weights to mask in each layer, per block. Raises BudgetError where no budget fits."""
    from stages.sparsity.budget import allocate, follow_pattern

    pattern = config.n_of_m
    if pattern is not None:
        return follow_pattern(layers.blocks, pattern)
    assert config.alpha is not None
    assert config.beta is not None
    return allocate(layers.blocks, config.target_sparsity, config.alpha, config.beta, layers.fixed)
