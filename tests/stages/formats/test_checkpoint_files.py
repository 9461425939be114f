"""safetensors written in pieces and read by name: the library's own bytes, whatever the dtypes."""

import pytest
import torch
from safetensors.torch import save

from stages.errors import DamagedFileError
from stages.formats.checkpoint_files import StateFile, serialized

TENSORS = {
    "b.weight": torch.randn(3, 4),
    "a": torch.randn(2, 2).to(torch.bfloat16),
    "half": torch.randn(1).to(torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "count": torch.tensor(7),
    "ints": torch.arange(3, dtype=torch.int32),
    "double": torch.randn(2, dtype=torch.float64),
    "small": torch.arange(3, dtype=torch.int8),
    "short": torch.arange(3, dtype=torch.int16),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 3),
    "a.weight": torch.randn(3, 4).T,
    "naïve": torch.ones(1),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_the_librarys(metadata):
    expected = save({name: tensor.contiguous() for name, tensor in TENSORS.items()}, metadata)
    assert b"".join(serialized(TENSORS, metadata)) == expected


def test_no_piece_is_larger_than_the_largest_tensor():
    assert max(len(piece) for piece in list(serialized(TENSORS))[1:]) == 3 * 4 * 4


def test_a_file_is_read_by_name_and_by_other_names(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(serialized(TENSORS)))
    assert {name: tensor.tolist() for name, tensor in StateFile(path).items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    renamed = StateFile(path, {"mine": "a", "gone": "nowhere"})
    assert list(renamed) == ["mine"]
    assert torch.equal(renamed["mine"], TENSORS["a"])
    with pytest.raises(KeyError):
        renamed["a"]


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(DamagedFileError, match="no safetensors file"):
        StateFile(path)
