"""From a run's configuration to the arguments of the stages."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config.checks import SEARCHED
from pipeline.config.quantities import parse_size
from pipeline.config.run_config import RunConfig
from pipeline.errors import ConfigError
from stages.pruners.registry import PRUNERS

if TYPE_CHECKING:
    from pipeline.steps.run_facts import StoredBlockBudget
    from stages.allocate import OutlierSettings
    from stages.data.drawing import Drawing
    from stages.distill import DistillSettings
    from stages.machine.device import DeviceChoices
    from stages.metrics.harness_tasks import TaskData
    from stages.models.base import BlockModel
    from stages.pruners.base import Pruner
    from stages.runtime.memory_estimate import Work
    from stages.runtime.memory_planner import Fit
    from stages.sparsity.budget import BlockBudget, LayerShape
    from stages.training.trainer import TrainingSettings


def pruner_of(config: RunConfig) -> Pruner:
    """What prunes the blocks, with the options of the run."""
    return PRUNERS.get(config.pruner_name)(config.prune_options)


def training_settings(config: RunConfig, epochs: int | None, lr: str | float | None) -> TrainingSettings:
    """How blocks are trained: by compensation or refinement, which have epochs and a learning rate of their own."""
    from stages.training.rates import Rate
    from stages.training.trainer import TrainingSettings

    assert epochs is not None
    assert lr is not None
    return TrainingSettings(
        epochs, Rate.parse(lr), config.lr_decay or 1.0, bool(config.held_out), config.seed, config.loss or "mse"
    )


def distill_settings(config: RunConfig) -> DistillSettings:
    """How all blocks are trained together at the end."""
    from stages.distill import DistillSettings
    from stages.training.rates import Rate

    assert config.distill_epochs is not None
    assert config.distill_lr is not None
    assert config.distill_batch is not None
    holds_out = config.held_out is not False  # methods that train nothing else have no such setting
    rate = None if config.distill_lr == SEARCHED else Rate.parse(config.distill_lr)
    return DistillSettings(config.distill_epochs, rate, config.distill_batch, holds_out, config.seed)


def block_budget(stored: StoredBlockBudget) -> BlockBudget:
    """Budget of a block, from run.json or from the commit of the step that decided it."""
    from stages.sparsity.budget import BlockBudget, LayerBudget

    layers = (LayerBudget(layer.name, layer.role, layer.size, layer.num_masked) for layer in stored.layers)
    return BlockBudget(tuple(layers))


def fit_memory(
    model: BlockModel, config: RunConfig, choices: DeviceChoices, at_once: Sequence[int], *, is_new: bool
) -> Fit:
    """The memory that a run will take, and the choices that keep it within --memory-limit, or what is free.

    Args:
        model: The original model.
        config: The run's.
        choices: The device and the dtype of streams.
        at_once: Numbers of samples that may share a forward pass, rising.
        is_new: The run begins here.

    Raises:
        ResourceError: None of them will do.
    """
    from stages.machine.device import memory_available, memory_in_use
    from stages.runtime.memory_estimate import Shapes
    from stages.runtime.memory_planner import Room, fit

    limit = parse_size(config.memory_limit) if config.memory_limit is not None else None
    room = Room(memory_available(choices.torch_device), limit, choices.torch_device.type != "cpu")
    return fit(
        Shapes.of(model, config.seqlen, choices.torch_dtype.itemsize),
        _work_of(config, model),
        memory_in_use(choices.torch_device),
        room,
        at_once,
        is_new=is_new,
    )


def statistics_room(
    model: BlockModel, block: int, config: RunConfig, choices: DeviceChoices, left_bytes: int
) -> int | None:
    """How many bytes the statistics of a block may take at once; None: all of them fit.

    left_bytes: what the run may take beside the memory that the process took before (`Fit.left_bytes`).
    """
    from stages.runtime.block_runner import samples_at_once
    from stages.runtime.memory_estimate import Shapes, statistics_room

    shapes = Shapes.of(model, config.seqlen, choices.torch_dtype.itemsize, block)
    return statistics_room(shapes, _work_of(config, model), samples_at_once(choices, config.seqlen), left_bytes)


def _work_of(config: RunConfig, model: BlockModel) -> Work:
    from stages.generate_samples import cache_bytes, pieces_at_once, pieces_of
    from stages.runtime.memory_estimate import Work

    pieces = len(pieces_of(config.distill_generated or 0, config.seqlen))

    return Work(
        pruner=PRUNERS.get(config.pruner_name),
        trains=config.is_lamp,
        is_quantized=config.bits is not None,
        eval_tokens=config.eval_seqlen if config.evaluate else 0,
        distills=bool(config.distill),
        kept=1 - config.target_sparsity,
        num_heads=_num_heads(config),
        num_at_once=min(pieces, pieces_at_once(model, config.seqlen)),
        cache_bytes=cache_bytes(model, config.seqlen),
        takes_over=config.from_run is not None,
    )


def _num_heads(config: RunConfig) -> int:
    """Heads in memory while the end loss is measured: the exported model may have one in another dtype."""
    if not config.end_loss or not config.has_calibration_set:
        return 0
    return 1 if config.export_dtype == "original" else 2


def prunable_layers(
    model: BlockModel, ignore: Sequence[str], *, prune_all: bool | None = None
) -> list[list[LayerShape]]:
    """The layers of each block that may be pruned.

    Args:
        model: The model.
        ignore: Regular expressions of the names of layers that stay dense.
        prune_all: Layers with the role "vital" are among them.

    Raises:
        ConfigError: None is left, or an expression matches no layer.
    """
    from stages.models.layer_roles import VITAL
    from stages.sparsity.budget import LayerShape

    patterns = [re.compile(pattern) for pattern in ignore]
    unused = set(ignore)
    blocks = []
    for index in range(model.num_blocks):
        kept = []
        for layer in model.layers(index):
            matching = [p.pattern for p in patterns if p.search(layer.name)]
            unused.difference_update(matching)
            if not matching and (prune_all or layer.role != VITAL):
                kept.append(LayerShape(layer.name, layer.role, layer.rows, layer.cols))
        blocks.append(kept)
    if unused:
        example = model.layers(0)[0].name
        raise ConfigError(f"--ignore {sorted(unused)[0]}: no layer has such a name (they look like {example})")
    if not any(blocks):
        raise ConfigError("--ignore leaves no layer to prune")
    return blocks


def fixed_sparsities(blocks: Sequence[Sequence[LayerShape]], overrides: Mapping[str, float]) -> dict[str, float]:
    """The sparsity of each layer, by name, that has one of its own. Raises ConfigError for a name that no layer has."""
    fixed: dict[str, float] = {}
    for pattern, sparsity in overrides.items():
        names = [layer.name for block in blocks for layer in block if re.search(pattern, layer.name)]
        if not names:
            raise ConfigError(f"layer_sparsity {pattern}: no prunable layer has such a name")
        fixed.update(dict.fromkeys(names, sparsity))
    return fixed


def outlier_settings(config: RunConfig, model: BlockModel, names: Collection[str]) -> OutlierSettings:
    """The settings of a budget by outliers. names: the layers that may be pruned."""
    from stages.allocate import OutlierSettings

    assert config.budget_spread is not None
    assert config.alpha is not None
    assert config.beta is not None
    every = prunable_layers(model, config.ignore, prune_all=True)
    blocks = [[layer for layer in block if layer.name in names] for block in every]
    fixed = fixed_sparsities(blocks, config.layer_sparsity)
    return OutlierSettings(blocks, config.budget_spread, config.target_sparsity, config.alpha, config.beta, fixed)


def drawing_of(config: RunConfig) -> Drawing:
    """Which samples the calibration set is made of."""
    from stages.data.drawing import Drawing

    assert config.num_samples is not None
    return Drawing(
        config.num_samples,
        config.seqlen,
        config.calibration_sampling,
        config.calibration_skip,
        config.seed,
        config.decided_bos,
        config.chat_template,
    )


def distillation_drawing_of(config: RunConfig) -> Drawing:
    """Which samples the set of distillation is made of, where it is not the calibration set."""
    assert config.distill_samples is not None
    return replace(drawing_of(config), num_samples=config.distill_samples, flag="--distill-samples")


def task_data_of(config: RunConfig) -> TaskData | None:
    """The rows of tasks on this machine, if any. Raises UsageError."""
    from stages.metrics.harness_tasks import TaskData

    return TaskData.at(config.task_data) if config.task_data is not None else None
