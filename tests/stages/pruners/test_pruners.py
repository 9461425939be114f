"""Pruners compared with plain implementations written from the papers, and with brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import NumericalError
from stages.pruners.hessian import factorise
from stages.pruners.magnitude import magnitude_mask
from stages.pruners.sparsegpt import sparsegpt
from stages.pruners.statistics import HessianSum, SquareSum
from stages.pruners.wanda import wanda_mask
from stages.quantization.grid import fit_grid
from stages.sparsity.nm_pattern import Pattern
from stages.sparsity.topk import smallest

pytestmark = pytest.mark.long


def layer(rows=24, cols=160, tokens=400, dtype=torch.float64, seed=0):
    """A weight, and inputs correlated like a transformer's."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=g, dtype=torch.float64) / cols**0.5
    x = torch.randn(tokens, cols, generator=g, dtype=torch.float64) @ mixing + 0.3
    return torch.randn(rows, cols, generator=g, dtype=torch.float64).to(dtype), x.to(dtype)


def hessian_of(x):
    return 2 / len(x) * x.T @ x


def plain_sparsegpt(weight, hessian, num_masked, damping=0.01, block=128, n_of_m=None, bits=None):
    """Optimal Brain Surgeon, one column at a time, with an explicit inverse Hessian that shrinks after each.

    n_of_m: (N, M), the N smallest of each group of M are chosen when the group is reached. bits: what is kept is
    rounded to the nearest of 2^bits values between the row's extremes, and the later columns learn of that error too.
    """
    w, (rows, cols) = weight.clone(), weight.shape
    dead = hessian.diagonal() == 0
    w[:, dead] = 0
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(cols, dtype=hessian.dtype)
    h[dead, dead] = 1
    inverse = torch.linalg.inv(h)
    pivots = torch.empty(cols, dtype=hessian.dtype)  # [H^-1]_jj once the columns before j are eliminated
    left = inverse.clone()
    for j in range(cols):
        pivots[j] = left[j, j]
        left = left - torch.outer(left[:, j], left[j]) / left[j, j]
    chosen = torch.zeros(rows, cols, dtype=torch.bool)
    if bits is not None:
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        step = ((high - low).float() / (2**bits - 1)).double()  # the grid is kept in fp32
        levels = (torch.arange(2**bits)[None] - torch.round(-low.float() / step.float()).double()[:, None]) * step[
            :, None
        ]
    for j in range(cols):
        if n_of_m is not None:
            if j % n_of_m[1] == 0:
                scores = w[:, j : j + n_of_m[1]] ** 2 / pivots[j : j + n_of_m[1]]
                for row in range(rows):
                    for k in scores[row].argsort(stable=True)[: n_of_m[0]].tolist():
                        chosen[row, j + k] = True
        elif j % block == 0:
            end = min(j + block, cols)
            count = num_masked * end // cols - num_masked * j // cols
            scores = (w[:, j:end] ** 2 / pivots[j:end]).flatten()
            part = torch.zeros(scores.numel(), dtype=torch.bool)
            part[torch.argsort(scores, stable=True)[:count]] = True
            chosen[:, j:end] = part.view(rows, end - j)
        kept = w[:, j].clone()
        if bits is not None:
            nearest = (levels - kept[:, None]).abs().argmin(1)
            kept = levels.gather(1, nearest[:, None])[:, 0]
        kept[chosen[:, j]] = 0
        error = (w[:, j] - kept) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        w[:, j] = kept
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w, chosen


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("cols", [96, 128, 160, 300])
def test_sparsegpt_in_float64_equals_the_plain_implementation(sparsity, cols):
    weight, x = layer(cols=cols)
    hessian = hessian_of(x)
    num_masked = round(sparsity * weight.numel())
    mine, mask = sparsegpt(weight, factorise(hessian, 0.01, on_retry=pytest.fail), num_masked)
    expected, expected_mask = plain_sparsegpt(weight, hessian, num_masked)
    assert torch.equal(mask, expected_mask)
    assert mask.sum() == num_masked
    assert torch.all(mine[mask] == 0)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_sparsegpt_in_fp32_is_as_good(sparsity):
    weight, x = layer(rows=48, cols=256, tokens=800)
    num_masked = round(sparsity * weight.numel())
    expected, shared = plain_sparsegpt(weight, hessian_of(x), num_masked)
    total = HessianSum(256, torch.device("cpu"))
    for part in x.float().split(100):
        total.add(part)
    torch.testing.assert_close(total.matrix().double(), hessian_of(x), rtol=1e-5, atol=1e-6)
    factor = factorise(total.matrix(), 0.01, on_retry=pytest.fail)
    under_shared, _ = sparsegpt(weight.float(), factor, num_masked, mask=shared)
    torch.testing.assert_close(under_shared.double(), expected, rtol=0, atol=1e-4)
    own, _ = sparsegpt(weight.float(), factor, num_masked)
    error = ((own.double() - weight) @ x.T).square().sum()
    reference = ((expected - weight) @ x.T).square().sum()
    assert abs(error / reference - 1) < 0.01


@pytest.mark.parametrize("cols", [96, 160, 300])
@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8), (1, 4), (1, 3), (3, 5), None])
@pytest.mark.parametrize("bits", [None, 3, 4])
def test_sparsegpt_with_patterns_and_bits_equals_the_plain_implementation(cols, n_of_m, bits):
    if n_of_m is not None:
        cols = cols // n_of_m[1] * n_of_m[1]
    weight, x = layer(rows=16, cols=cols)
    hessian = hessian_of(x)
    pattern = Pattern(*n_of_m) if n_of_m else None
    num_masked = pattern.count(weight.numel()) if pattern else round(0.6 * weight.numel())
    grid = fit_grid(weight, bits) if bits else None
    factor = factorise(hessian, 0.01, on_retry=pytest.fail)
    mine, mask = sparsegpt(weight, factor, num_masked, pattern=pattern, grid=grid)
    expected, expected_mask = plain_sparsegpt(weight, hessian, num_masked, n_of_m=n_of_m, bits=bits)
    assert torch.equal(mask, expected_mask)
    assert mask.sum() == num_masked
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6 if bits else 1e-9)
    if n_of_m:
        assert ((mine.reshape(-1, n_of_m[1]) == 0).sum(1) >= n_of_m[0]).all()
    if bits:
        assert max(len(row.unique()) for row in mine.float()) <= 2**bits


def test_the_joint_sweep_beats_pruning_and_then_rounding():
    weight, x = layer(rows=48, cols=256, tokens=800)
    factor = factorise(hessian_of(x), 0.01, on_retry=pytest.fail)
    pattern, grid = Pattern(2, 4), fit_grid(weight, 3)
    joint, _ = sparsegpt(weight, factor, weight.numel() // 2, pattern=pattern, grid=grid)
    pruned, mask = sparsegpt(weight, factor, weight.numel() // 2, pattern=pattern)
    stacked = grid.nearest(pruned).masked_fill(mask, 0)
    assert ((joint - weight) @ x.T).norm() < 0.97 * ((stacked - weight) @ x.T).norm()


def test_one_factorisation_shared_by_layers_gives_what_separate_ones_give():
    """q, k and v read the same input: stacked weights, or one by one with separate factors, give the same result."""
    (q, x), (k, _), (v, _) = layer(seed=1), layer(seed=2, rows=8), layer(seed=3, rows=8)
    shared = factorise(hessian_of(x), 0.01, on_retry=pytest.fail)
    for weight in (q, k, v):
        own = factorise(hessian_of(x).clone(), 0.01, on_retry=pytest.fail)
        for a, b in zip(sparsegpt(weight, shared, 500), sparsegpt(weight, own, 500), strict=True):
            assert torch.equal(a, b)


def test_sparsegpt_beats_magnitude_and_leaves_its_argument_alone():
    weight, x = layer()
    before = weight.clone()
    mine, _ = sparsegpt(weight, factorise(hessian_of(x), 0.01, on_retry=pytest.fail), weight.numel() // 2)
    assert torch.equal(weight, before)
    plain = weight.masked_fill(magnitude_mask(weight, weight.numel() // 2), 0)
    assert ((mine - weight) @ x.T).norm() < 0.9 * ((plain - weight) @ x.T).norm()


def test_dead_columns_are_zeroed_and_pruned_first():
    weight, x = layer(cols=140)
    x[:, [3, 70, 139]] = 0
    hessian = hessian_of(x)
    factor = factorise(hessian, 0.01, on_retry=pytest.fail)
    assert factor.dead.nonzero().flatten().tolist() == [3, 70, 139]
    for num_masked in (10, weight.numel() // 2):
        mine, mask = sparsegpt(weight, factor, num_masked)
        expected, expected_mask = plain_sparsegpt(weight, hessian, num_masked)
        assert torch.equal(mask, expected_mask)
        assert torch.all(mine[:, factor.dead] == 0)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)
    assert mask[:, factor.dead].all()


def test_all_inputs_zero_and_a_single_token_have_an_answer():
    weight, x = layer(cols=32)
    for hessian in (torch.zeros(32, 32, dtype=torch.float64), hessian_of(x[:1])):
        mine, mask = sparsegpt(weight, factorise(hessian, 0.01, on_retry=pytest.fail), 100)
        assert mask.sum() == 100
        assert torch.isfinite(mine).all()


def test_a_hessian_without_a_factor_is_retried_with_more_damping_then_refused():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    messages = []
    factor = factorise(indefinite, 0.01, messages.append)
    assert factor.damping == pytest.approx(0.1)
    assert len(messages) == 1
    assert "damping 0.1" in messages[0]
    messages.clear()
    with pytest.raises(NumericalError, match="damping 10"):
        factorise(torch.diag(torch.tensor([100.0, -90.0], dtype=torch.float64)), 0.01, messages.append)
    assert len(messages) == 3
    with pytest.raises(NumericalError, match="infinities or NaN"):
        factorise(torch.full((2, 2), float("nan")), 0.01, messages.append)


@pytest.mark.parametrize("num_masked", [0, 1, 24, 25, 1000, 1919, 1920])
def test_wanda_keeps_the_largest_scores_of_each_row(num_masked):
    weight, x = layer(rows=24, cols=80)
    mask = wanda_mask(weight, x.square().mean(0), num_masked)
    assert mask.sum() == num_masked
    scores = weight.abs() * x.square().mean(0).sqrt()
    for row in range(24):
        count = num_masked // 24 + (row < num_masked % 24)
        expected = torch.zeros(80, dtype=torch.bool)
        expected[torch.argsort(scores[row])[:count]] = True
        assert torch.equal(mask[row], expected)


def test_wanda_equals_the_published_rule_where_it_is_defined():
    """The published code zeroes int(cols * s) weights per row by a sort."""
    weight, x = layer(rows=20, cols=100, dtype=torch.float32)
    total = SquareSum(100, torch.device("cpu"))
    total.add(x[:30])
    total.add(x[30:])
    assert torch.allclose(total.mean_square(), x.square().mean(0))
    metric = weight.abs() * torch.sqrt(total.mean_square().reshape(1, -1))
    expected = torch.zeros_like(metric, dtype=torch.bool)
    order = torch.sort(metric, dim=-1, stable=True)[1]
    expected.scatter_(1, order[:, : int(100 * 0.7)], True)
    assert torch.equal(wanda_mask(weight, total.mean_square(), 1400), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (2, 5)])
def test_wanda_n_of_m_equals_the_published_rule(n, m):
    """The published loop over columns: in each group of m, the n smallest by topk."""
    weight, x = layer(rows=20, cols=80, dtype=torch.float32)
    metric = weight.abs() * x.square().mean(0).sqrt()
    expected = torch.zeros_like(metric, dtype=torch.bool)
    for j in range(0, 80, m):
        expected.scatter_(1, j + torch.topk(metric[:, j : j + m], n, dim=1, largest=False)[1], True)
    assert torch.equal(wanda_mask(weight, x.square().mean(0), 20 * 80 * n // m, Pattern(n, m)), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2)])
def test_magnitude_n_of_m_keeps_the_largest_of_each_group(n, m):
    weight, _ = layer(rows=6, cols=32)
    mask = magnitude_mask(weight, 6 * 32 * n // m, Pattern(n, m))
    for row in range(6):
        for j in range(0, 32, m):
            size = weight[row, j : j + m].abs()
            gone = mask[row, j : j + m]
            assert gone.sum() == n
            assert size[gone].max() < size[~gone].min()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_selection_equals_a_stable_sort_ties_and_all(values, data):
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[torch.argsort(scores, stable=True)[:count]] = True
    assert torch.equal(smallest(scores, count), expected)
    assert torch.equal(magnitude_mask(scores[None], count)[0], smallest(scores.abs(), count))


def test_selection_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        smallest(torch.tensor([1.0, float("nan")]), 1)
