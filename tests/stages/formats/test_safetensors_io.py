"""safetensors as bytes: what is written opens elsewhere, and room for the header is always enough."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.formats.safetensors_io import TensorFile, TensorWriter, open_new


class Pretending:
    """Takes pieces for terabytes, and keeps the header."""

    def __init__(self):
        self.header = b""
        self.at_start = False

    def seek(self, offset):
        self.at_start = offset == 0

    def write(self, data):
        if self.at_start:
            self.header += bytes(data)
        return 4 * 10**12


def test_the_room_that_is_left_holds_the_longest_names_and_offsets():
    names = [f"layer.{i}" for i in range(20)]
    sink = Pretending()
    writer = TensorWriter(sink, [(name, (4096, 4096)) for name in names], {"format": "test"})
    for name in names:
        writer.add(f"{name}::codes", "F8_E4M3", [9999, 9999], [b""])
    writer.finish()
    described = json.loads(sink.header[8:])
    assert described["layer.19::codes"]["data_offsets"] == [19 * 4 * 10**12, 20 * 4 * 10**12]


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "theirs", {"key": "value"})
    with TensorFile(tmp_path / "theirs") as file, open_new(tmp_path / "ours") as sink:
        assert file.metadata == {"key": "value"}
        writer = TensorWriter(sink, [(name, e.shape) for name, e in file.entries.items()], file.metadata)
        for name, entry in file.entries.items():
            assert bytes(file.read(name)) == b"".join(file.pieces(name))
            writer.add(name, entry.dtype, entry.shape, file.pieces(name))
        size = writer.finish()
    assert size == (tmp_path / "ours").stat().st_size
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_name_may_be_used_once(tmp_path):
    with open_new(tmp_path / "file") as sink:
        writer = TensorWriter(sink, [("a", ()), ("a", ())], {})
        writer.add("a", "U8", [1], [b"x"])
        with pytest.raises(ValueError, match="two tensors would be called a"):
            writer.add("a", "U8", [1], [b"x"])


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": {"dtype": "U8", "shape": [1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 3]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": ["x", "y"]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "U8", "shape": ["1"], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2.0]}}',
        b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, '
        b'"b": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [2, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "b": {"dtype": "F32", "shape": [-1, 0], '
        b'"data_offsets": [2, 2]}}',
        b'{"__metadata__": [1], "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
        b'{"__metadata__": {"a": 1}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "??", "shape": [-2, -1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "F4", "shape": [5], "data_offsets": [0, 2]}}',
    ],
)
def test_a_header_that_does_not_fit_its_file_is_a_value_error(header, tmp_path):
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"zz")
    with pytest.raises(ValueError, match=r"damaged header|its header speaks of"):
        TensorFile(tmp_path / "file")


@pytest.mark.parametrize(("start", "says"), [(1, "b overlaps another tensor"), (3, "a gap before b")])
def test_tensors_that_overlap_and_gaps_are_told_apart(tmp_path, start, says):
    places = {"a": [0, 2], "b": [start, start + 2]}
    whole = {name: {"dtype": "U8", "shape": [2], "data_offsets": place} for name, place in places.items()}
    header = json.dumps(whole).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"zz")
    with pytest.raises(ValueError, match=says):
        TensorFile(tmp_path / "file")


def test_numbers_of_four_bits_fill_half_as_many_bytes(tmp_path):
    header = b'{"a": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}'
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"zz")
    with TensorFile(tmp_path / "file") as file:
        assert file.entries["a"].shape == (2, 2)
