"""Bit packing against plain Python, one bit after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.formats.packed import bit_packing
from stages.formats.packed.bit_packing import pack_codes, packed_length, unpack_codes


def slow_pack(codes: list[int], bits: int) -> bytes:
    digits = "".join(format(code, f"0{bits}b") for code in codes)
    digits += "0" * (-len(digits) % 8)
    return bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))


@st.composite
def codes_of_some_width(draw):
    bits = draw(st.integers(2, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=100))


@settings(max_examples=200, deadline=None)
@given(codes_of_some_width(), st.sampled_from([8, 16, 64, 1 << 20]))
def test_packed_codes_are_those_of_plain_python_and_come_back(case, piece):
    bits, codes = case
    before = bit_packing._PIECE
    bit_packing._PIECE = piece  # so that a short list is many pieces
    try:
        packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
        back = unpack_codes(packed, bits, len(codes))
    finally:
        bit_packing._PIECE = before
    assert packed.numpy().tobytes() == slow_pack(codes, bits)
    assert len(packed) == packed_length(len(codes), bits)
    assert back.tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_more_codes_than_one_piece_holds(bits):
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 2**bits, (1 << 20) + 13, dtype=np.uint8))
    packed = pack_codes(codes, bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, len(codes)), codes)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="code 4 does not fit into 2 bits"):
        pack_codes(torch.tensor([1, 4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="do not hold 4 codes of 3 bits"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 3, 4)
    for bits in (1, 9):
        with pytest.raises(ValueError, match="2 to 8"):
            pack_codes(torch.zeros(1, dtype=torch.uint8), bits)
