"""Files of masks and grids: what is written comes back, always as the same bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from stages.errors import DamagedFileError
from stages.formats.pruning_masks import PrunedWeight, mask_file, pack_bits, read_mask_file, unpack_bits
from stages.quantization.grid import fit_grid


def layers():
    weight = torch.randn(6, 21, generator=torch.Generator().manual_seed(0))
    return {
        "b.0.q": PrunedWeight("b.0.q.weight", False, weight > 0, None),
        "b.0.fc2": PrunedWeight("h.0.c.weight", True, weight < 0.5, fit_grid(weight, 3, 8)),
    }


def test_masks_and_grids_come_back(tmp_path):
    (tmp_path / "m").write_bytes(mask_file(layers()))
    for (name, read), (expected_name, expected) in zip(
        read_mask_file(tmp_path / "m").items(), layers().items(), strict=True
    ):
        assert (name, read.key, read.transposed) == (expected_name, expected.key, expected.transposed)
        assert torch.equal(read.mask, expected.mask)
        if expected.grid is None:
            assert read.grid is None
        else:
            assert (read.grid.bits, read.grid.group_size) == (3, 8)
            assert torch.equal(read.grid.scale, expected.grid.scale)
            assert torch.equal(read.grid.zero, expected.grid.zero)
    assert list(read_mask_file(tmp_path / "m", only="b.0.q")) == ["b.0.q"]


def test_the_same_masks_are_the_same_bytes():
    """safetensors writes several entries of metadata in no fixed order: a resumed run would differ from a quiet one."""
    assert len({mask_file(layers()) for _ in range(20)}) == 1


def test_another_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "m", {"format": "pt"})
    with pytest.raises(DamagedFileError, match="no file of masks"):
        read_mask_file(tmp_path / "m")


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 1000))
def test_bits_are_packed_with_the_first_column_in_the_highest_bit(rows, cols, seed):
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_bits(mask)
    assert packed.shape == (rows, -(-cols // 8))
    for row in range(rows):
        for column in range(cols):
            assert bool(packed[row, column // 8] >> (7 - column % 8) & 1) == bool(mask[row, column])
    assert torch.equal(unpack_bits(packed, cols), mask)
