"""Conformance kit for pruners: `check_pruner` raises AssertionError with the requirement that a pruner fails."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.pruners.base import LayerProblem, PooledStatistics, PrunedMatrix, PruneOptions, Pruner
from stages.pruners.registry import PRUNERS
from stages.quantization.grid import fit_grid, most_levels
from stages.sparsity.nm_pattern import Pattern

# (rows, cols, tokens): square, wide, one row, one column, fewer tokens than channels, no multiple of anything.
_SHAPES = ((16, 16, 64), (8, 48, 96), (1, 24, 48), (12, 1, 32), (6, 40, 10), (7, 33, 50))
_PATTERNS = (Pattern(2, 4), Pattern(1, 8))
_CPU = torch.device("cpu")


def check_pruner(pruner: type[Pruner] | str) -> None:
    """Check a pruner on small random layers.

    Requirements: exactly `num_masked` weights are masked; every masked weight is zero; every N:M group keeps its
    pattern; every quantized row has at most 2^bits distinct values; the result is finite, and bit-identical at every
    call and from restored statistics; statistics that experts share add up, in groups to the same bits; the original
    weight is unchanged; unsupported options are refused; name, title, help and memory estimates are complete.

    Args:
        pruner: The class, or its name in the registry.

    Raises:
        AssertionError: A requirement fails. The message names it, with the layer and the options.
    """
    if isinstance(pruner, str):
        assert PRUNERS.get(pruner).name == pruner, f"{pruner} has the name {PRUNERS.get(pruner).name}"
        pruner = PRUNERS.get(pruner)
    _check_description(pruner)
    _check_refusals(pruner)
    for rows, cols, tokens in _SHAPES:
        for share in (0.0, 0.3, 0.77, 1.0):
            _check_layer(pruner, PruneOptions(), _layer(rows, cols, tokens), int(share * rows * cols))
    for pattern in _PATTERNS if pruner.supports_pattern else ():
        weight, x = _layer(8, 48, 96)
        options = PruneOptions(pattern=pattern)
        _check_layer(pruner, options, (weight, x), pattern.count(weight.numel()))
        if pruner.supports_bits:
            _check_layer(pruner, PruneOptions(pattern=pattern, bits=4), (weight, x), pattern.count(weight.numel()))
    if pruner.supports_bits:
        for bits, group_size in ((3, None), (4, 16)):
            options = PruneOptions(bits=bits, group_size=group_size)
            _check_layer(pruner, options, _layer(8, 48, 96), 200)
    weight, x = _layer(8, 16, 64)
    x[:, 3] = 0  # a channel that is zero on every token
    _check_layer(pruner, PruneOptions(), (weight, x), 64)
    kind = pruner.statistics()
    if kind is not None and issubclass(kind, PooledStatistics):
        _check_sharing(pruner, kind)


def _check_description(pruner: type[Pruner]) -> None:
    for attribute in ("name", "title", "help"):
        value = getattr(pruner, attribute, None)
        assert isinstance(value, str), f"{pruner.__name__}.{attribute} is missing"
        assert value == value.strip(), f"{pruner.__name__}.{attribute} is empty or padded: {value!r}"
        assert value, f"{pruner.__name__}.{attribute} is empty"
    assert "\n" not in pruner.help, f"{pruner.__name__}.help is more than one line"
    assert pruner.num_weight_copies > 0, f"{pruner.__name__}.num_weight_copies must be positive"
    for is_shared in (False, True):
        assert pruner.num_matrices(is_shared=is_shared) >= 0, f"{pruner.__name__}.num_matrices is negative"
    kind = pruner.statistics()
    assert pruner.needs_data or kind is None, f"{pruner.__name__} needs no data and asks for statistics"
    if kind is not None:
        assert kind.num_numbers(10) > 0, f"{kind.__name__}.num_numbers must be positive"


def _check_refusals(pruner: type[Pruner]) -> None:
    unsupported = []
    if not pruner.supports_bits:
        unsupported.append(PruneOptions(bits=4))
    if not pruner.supports_pattern:
        unsupported.append(PruneOptions(pattern=Pattern(2, 4)))
    for options in unsupported:
        try:
            pruner(options)
        except UsageError:
            continue
        raise AssertionError(f"{pruner.name} does not refuse {options}, which it does not support")


def _layer(rows: int, cols: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight (rows, cols) without zeros, and the inputs (tokens, cols) of its layer."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    weight = torch.randn(rows, cols, generator=generator)
    return weight + 0.01 * weight.sign(), torch.randn(tokens, cols, generator=generator)


def _check_layer(pruner: type[Pruner], options: PruneOptions, layer: tuple[Tensor, Tensor], num_masked: int) -> None:
    weight, x = layer
    where = f"{pruner.name}, {tuple(weight.shape)}, {num_masked} masked, {options}"
    original = weight.clone()
    first, second = (_pruned(pruner, options, weight, x, num_masked, restore=restore) for restore in (False, True))
    assert torch.equal(weight, original), f"{where}: the original weight was changed"
    assert first.weight.shape == weight.shape, f"{where}: the result has another shape"
    assert first.weight.dtype == weight.dtype, f"{where}: the result has another dtype"
    assert first.mask.dtype == torch.bool, f"{where}: the pruning mask is not boolean"
    assert torch.equal(first.mask, second.mask), f"{where}: restored statistics give another pruning mask"
    assert torch.equal(first.weight, second.weight), f"{where}: restored statistics give other weights"
    assert int(first.mask.sum()) == num_masked, f"{where}: {int(first.mask.sum())} weights are masked"
    assert bool(torch.isfinite(first.weight).all()), f"{where}: the result is not finite"
    assert not bool(first.weight[first.mask].any()), f"{where}: a masked weight is not zero"
    if options.pattern is not None:
        held = options.pattern.share_held(first.mask)
        assert held == 1, f"{where}: {held:.0%} of the groups hold {options.pattern}"
    if options.bits is not None:
        levels = most_levels(first.weight, options.group_size)
        assert levels <= 2**options.bits, f"{where}: a row has {levels} distinct values"


def _check_sharing(pruner: type[Pruner], kind: type[PooledStatistics]) -> None:
    """Statistics of several experts add up, stay as they are, and serve an expert that has none."""
    weight, x = _layer(8, 16, 64)
    parts = [kind(16, _CPU), kind(16, _CPU)]
    parts[0].add(x[:40])
    parts[1].add(x[40:])
    before = [part.state()[0].clone() for part in parts]
    total, whole, empty = kind.total(parts), kind(16, _CPU), kind(16, _CPU)
    whole.add(x)
    assert torch.allclose(total.state()[0], whole.state()[0], rtol=1e-4, atol=1e-5), f"{kind.__name__}.total is no sum"
    stepwise = kind.total([kind.total(parts[:1]), parts[1]])
    assert torch.equal(stepwise.state()[0], total.state()[0]), f"{kind.__name__}.total depends on groups of parts"
    unchanged = all(torch.equal(part.state()[0], sums) for part, sums in zip(parts, before, strict=True))
    assert unchanged, f"{kind.__name__}.total changed its parts"
    empty.complete(total, 16)
    entry = pruner(PruneOptions())
    prepared = entry.prepare(empty, is_shared=False, warn=lambda message: None)
    found = entry.prune(LayerProblem("layer", weight, 40, None), prepared)
    assert int(found.mask.sum()) == 40, f"{pruner.name}: {int(found.mask.sum())} weights are masked, not 40"
    assert bool(torch.isfinite(found.weight).all()), f"{pruner.name}: the result of shared statistics is not finite"


def _pruned(
    pruner: type[Pruner], options: PruneOptions, weight: Tensor, x: Tensor, num_masked: int, *, restore: bool
) -> PrunedMatrix:
    """Prune one layer; with `restore`, the statistics go through a checkpoint after half of the tokens."""
    entry, kind, prepared = pruner(options), pruner.statistics(), None
    if kind is not None:
        statistics = kind(weight.shape[1], _CPU)
        half = len(x) // 2
        statistics.add(x[:half])
        if restore:
            sums, counts = statistics.state()
            statistics = kind.restored(sums.clone(), dict(counts), _CPU)
        statistics.add(x[half:])
        prepared = entry.prepare(statistics, is_shared=restore, warn=lambda message: None)
    grid = fit_grid(weight, options.bits, options.group_size) if options.bits is not None else None
    return entry.prune(LayerProblem("layer", weight, num_masked, grid), prepared)
