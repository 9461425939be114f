"""Quantization grids against torch's own fake quantization and against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import NumericalError
from stages.quantization.grid import Grid, fit_grid, most_levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(rows=12, cols=64, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_that_of_torchs_per_channel_fake_quantization(bits):
    weight = weights()
    grid = fit_grid(weight, bits)
    expected = torch.fake_quantize_per_channel_affine(
        weight, grid.scale[:, 0], grid.zero[:, 0].int(), axis=0, quant_min=0, quant_max=2**bits - 1
    )
    different = (grid.nearest(weight) - expected).abs() > 1e-7
    # torch multiplies by 1 / scale, so a weight in the very middle of two values may go the other way.
    assert different.double().mean() < 0.002
    torch.testing.assert_close(grid.nearest(weight), expected, rtol=0, atol=1.01 * grid.scale.max().item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_is_the_published_one(bits):
    """SparseGPT's Quantizer.find_params, per channel and asymmetric."""
    weight = weights()
    weight[3] = 0
    weight[4] = weight[4].abs() + 0.1  # the smallest value of a row may be positive: zero is on the grid all the same
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low[empty], high[empty] = -1, 1
    scale = (high - low) / (2**bits - 1)
    grid = fit_grid(weight, bits)
    torch.testing.assert_close(grid.scale[:, 0], scale, rtol=0, atol=0)
    assert torch.equal(grid.zero[:, 0], torch.round(-low / scale))
    assert torch.all(grid.nearest(torch.zeros_like(weight)) == 0)


@pytest.mark.long
@given(st.integers(2, 8), st.sampled_from([None, 1, 5, 16, 64, 100]), st.integers(0, 5), st.sampled_from(DTYPES))
def test_every_value_is_one_of_the_grids_nearest_and_comes_back_from_its_code(bits, group_size, seed, dtype):
    weight = weights(rows=3, seed=seed)
    grid = fit_grid(weight, bits, group_size)
    nearest = grid.nearest(weight)
    size = group_size or 64
    for row in range(3):
        for column in range(64):
            scale, zero = grid.scale[row, column // size], grid.zero[row, column // size]
            levels = (torch.arange(2**bits) - zero) * scale
            best = (levels - weight[row, column]).abs().min()
            assert nearest[row, column] in levels
            assert (nearest[row, column] - weight[row, column]).abs() <= best * (1 + 1e-4) + 1e-7
    stored = nearest.to(dtype)
    codes = grid.codes_of_stored(stored)
    assert int(codes.max()) < 2**bits
    assert torch.equal(grid.values(codes.float()).to(dtype), stored)
    assert most_levels(stored, group_size) <= 2**bits


def test_a_weight_off_its_grid_is_seen():
    weight = weights()
    grid = fit_grid(weight, 4)
    stored = grid.nearest(weight)
    stored[0, 0] += 0.3 * grid.scale[0, 0]
    with pytest.raises(NumericalError, match="1 weights are not on their 4-bit grid"):
        grid.codes_of_stored(stored)


def test_levels_are_counted_by_row_or_by_group():
    weight = torch.tensor([[0.0, 1, 2, 3, 0, 1], [5, 5, 5, 5, 5, 5]])
    assert most_levels(weight) == 4
    assert most_levels(weight, 2) == 2
    assert most_levels(weight, 4) == 4


def test_tiny_and_constant_rows_have_a_finite_grid():
    weight = torch.tensor([[1e-42, -1e-42, 0.0, 0.0], [2.0, 2, 2, 2], [-3.0, -3, -3, -3], [0.0, 0, 0, 0]])
    grid = fit_grid(weight, 3)
    assert isinstance(grid, Grid)
    nearest = grid.nearest(weight)
    assert torch.isfinite(nearest).all()
    torch.testing.assert_close(nearest[1:], weight[1:])
