"""ALPS compared with explicit least squares, with the best of all masks, and with SparseGPT."""

import itertools

import numpy
import pytest
import torch

from stages.pruners.alps import alps, split
from stages.pruners.hessian import factorise
from stages.pruners.sparsegpt import sparsegpt
from stages.pruners.statistics import HessianSum
from stages.sparsity.nm_pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def layer(rows=24, cols=64, tokens=200, seed=0):
    """A weight, and inputs correlated like a transformer's, with channels of very different scale."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=g, dtype=torch.float64) / cols**0.5
    mixing *= torch.randn(cols, generator=g, dtype=torch.float64).exp()
    x = torch.randn(tokens, cols, generator=g, dtype=torch.float64) @ mixing + 0.3
    return torch.randn(rows, cols, generator=g, dtype=torch.float64), x


def statistics(x, damping=0.01):
    hessian = 2 / len(x) * x.T @ x
    return hessian, factorise(hessian, damping, on_retry=pytest.fail)


def damped_error(pruned, weight, hessian, factor):
    """The objective of the pruners, without dead columns."""
    lost = (pruned - weight)[:, ~factor.dead]
    live = hessian[~factor.dead][:, ~factor.dead]
    share = factor.damping * hessian.diagonal().mean()
    return (((lost @ live) * lost).sum() + share * lost.square().sum()).item()


def least_squares(weight, x, mask, damping=0.01):
    """Row by row: the kept weights closest to the dense output; the damping is added as extra tokens."""
    hessian = 2 / len(x) * x.T @ x
    extra = (damping * hessian.diagonal().mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    rows = torch.cat([(2 / len(x)) ** 0.5 * x, extra]).numpy()
    best = numpy.zeros(weight.shape)
    for r, (row, kept) in enumerate(zip(weight.numpy(), (~mask).numpy(), strict=True)):
        best[r, kept] = numpy.linalg.lstsq(rows[:, kept], rows @ row, rcond=None)[0]
    return torch.from_numpy(best)


@pytest.mark.parametrize("pattern", [None, TWO_FOUR])
def test_kept_weights_are_the_least_squares_solution_under_the_mask(pattern):
    weight, x = layer()
    hessian, factor = statistics(x)
    mine, mask = alps(weight, hessian, factor, weight.numel() // 2, pattern=pattern, refit_iterations=200)
    torch.testing.assert_close(mine, least_squares(weight, x, mask), rtol=0, atol=1e-8)


def test_few_refit_iterations_come_close():
    weight, x = layer()
    hessian, factor = statistics(x)
    mine, mask = alps(weight, hessian, factor, round(0.7 * weight.numel()))
    best = damped_error(least_squares(weight, x, mask), weight, hessian, factor)
    assert best <= damped_error(mine, weight, hessian, factor) < 1.05 * best


@pytest.mark.parametrize("num_masked", [0, 1, 500, 767, 768, 1000, 1535, 1536])
def test_counts_are_exact_and_arguments_left_alone(num_masked):
    weight, x = layer()
    hessian, factor = statistics(x)
    before = weight.clone(), hessian.clone()
    mine, mask = alps(weight, hessian, factor, num_masked)
    assert mask.sum() == num_masked
    assert torch.all(mine[mask] == 0)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    if num_masked == 0:
        torch.testing.assert_close(mine, weight)


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4), Pattern(4, 8), Pattern(5, 16)])
def test_patterns_hold_in_every_group(pattern):
    weight, x = layer()
    hessian, factor = statistics(x)
    mine, mask = alps(weight, hessian, factor, pattern.count(weight.numel()), pattern=pattern)
    assert torch.all(mask.view(-1, pattern.group).sum(dim=1) == pattern.num_zero)
    assert torch.all(mine[mask] == 0)


@pytest.mark.parametrize("pattern", [None, TWO_FOUR])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.7, 0.95])
def test_the_error_is_never_above_that_of_sparsegpt(share, pattern):
    ratios = []
    for seed in range(30):
        # Down to layers of one row, groups as wide as the layer, and fewer tokens than columns.
        weight, x = layer(rows=1 + seed % 7, cols=4 * (1 + seed % 5), tokens=1 + 3 * seed, seed=seed)
        hessian, factor = statistics(x)
        num_masked = round(share * weight.numel()) if pattern is None else weight.numel() // 2
        theirs, _ = sparsegpt(weight, factor, num_masked, pattern=pattern)
        mine, _ = alps(weight, hessian, factor, num_masked, pattern=pattern)
        errors = [damped_error(w, weight, hessian, factor) for w in (mine, theirs)]
        assert errors[0] <= errors[1] * (1 + 1e-9)
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("share", [0.5, 0.7, 0.8])
def test_splitting_chooses_a_better_mask_than_sparsegpt(share):
    """Both results are refitted exactly, so that only the masks differ."""
    weight, x = layer(rows=48, cols=160, tokens=400)
    hessian, factor = statistics(x)
    num_masked = round(share * weight.numel())
    errors = []
    for mask in (alps(weight, hessian, factor, num_masked)[1], sparsegpt(weight, factor, num_masked)[1]):
        errors.append(damped_error(least_squares(weight, x, mask), weight, hessian, factor))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.long
def test_tiny_layers_come_near_the_best_of_all_masks():
    found, best, greedy = 0.0, 0.0, 0.0
    for seed in range(8):
        weight, x = layer(rows=1, cols=10, tokens=40, seed=seed)
        hessian, factor = statistics(x)
        errors = []
        for chosen in itertools.combinations(range(10), 5):
            mask = torch.zeros(1, 10, dtype=torch.bool)
            mask[0, list(chosen)] = True
            errors.append(damped_error(least_squares(weight, x, mask), weight, hessian, factor))
        mine = damped_error(alps(weight, hessian, factor, 5, refit_iterations=50)[0], weight, hessian, factor)
        assert mine >= min(errors) * (1 - 1e-9)
        found, best = found + mine, best + min(errors)
        greedy += damped_error(sparsegpt(weight, factor, 5)[0], weight, hessian, factor)
    assert found < 1.3 * best < greedy


def test_dead_columns_are_zeroed_and_pruned_first():
    weight, x = layer()
    x[:, [3, 40, 63]] = 0
    hessian, factor = statistics(x)
    for num_masked in (10, weight.numel() // 2):
        mine, mask = alps(weight, hessian, factor, num_masked)
        assert mask.sum() == num_masked
        assert torch.all(mine[:, factor.dead] == 0)
    assert mask[:, factor.dead].all()
    mine, mask = alps(weight, hessian, factor, weight.numel() // 2, pattern=TWO_FOUR)
    assert mask[:, factor.dead].all()
    expected = least_squares(weight.masked_fill(factor.dead, 0), x, mask)
    exact, _ = alps(weight, hessian, factor, weight.numel() // 2, pattern=TWO_FOUR, refit_iterations=200)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_inputs_zero_and_a_single_token_have_an_answer(dtype):
    weight, x = layer(cols=32)
    for hessian in (torch.zeros(32, 32, dtype=dtype), (2 * x[:1].T @ x[:1]).to(dtype)):
        factor = factorise(hessian, 0.01, on_retry=pytest.fail)
        for pattern in (None, TWO_FOUR):
            mine, mask = alps(weight.to(dtype), hessian, factor, weight.numel() // 2, pattern=pattern)
            assert mask.sum() == weight.numel() // 2
            assert torch.isfinite(mine).all()
            assert mine.dtype == dtype


def test_fp32_is_as_good_as_float64_and_repeats_to_the_last_bit():
    weight, x = layer(rows=48, cols=256, tokens=800)
    total = HessianSum(256, torch.device("cpu"))
    total.add(x)
    hessian, factor = statistics(x)
    small = total.matrix()
    small_factor = factorise(small, 0.01, on_retry=pytest.fail)
    num_masked = round(0.7 * weight.numel())
    mine, mask = alps(weight.float(), small, small_factor, num_masked)
    again, mask_again = alps(weight.float(), small, small_factor, num_masked, splitting=split(small, small_factor))
    assert torch.equal(mine, again)
    assert torch.equal(mask, mask_again)
    reference = damped_error(alps(weight, hessian, factor, num_masked)[0], weight, hessian, factor)
    assert damped_error(mine.double(), weight, hessian, factor) == pytest.approx(reference, rel=0.01)


def test_weights_keep_their_dtype():
    weight, x = layer(cols=32)
    hessian, factor = statistics(x)
    mine, mask = alps(weight.bfloat16(), hessian, factor, 300)
    assert mine.dtype == torch.bfloat16
    assert torch.all(mine[mask] == 0)


def test_more_damping_of_the_factor_is_followed():
    """The splitting uses the damping with which the factorization succeeded."""
    weight, x = layer()
    hessian, factor = statistics(x, damping=0.5)
    mine, mask = alps(weight, hessian, factor, weight.numel() // 2, refit_iterations=200)
    torch.testing.assert_close(mine, least_squares(weight, x, mask, damping=0.5), rtol=0, atol=1e-8)
