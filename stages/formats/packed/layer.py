"""One pruned layer in its smallest form: which elements are stored, as what, and where its mask is.

R: output rows.    C: input columns.    K: weights that are kept (not masked). A form is chosen only after its bytes
were taken apart again and gave the very bits of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.errors import NumericalError
from stages.formats.packed.bit_packing import pack_codes, packed_length, unpack_codes
from stages.formats.pruning_masks import PrunedWeight
from stages.formats.safetensors_io import Bytes
from stages.quantization.grid import Grid

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Form:
    """How a layer is stored."""

    holds: Literal["values", "codes"]  # in the weight's own dtype, or numbers of grid points, bit-packed
    kept_only: bool  # the K kept ones, row after row of (R, C); otherwise all, values as the model's file has them
    mask: Literal["stored", "zeros", "empty"]  # as it is; the weights whose bits are all 0; nothing is masked

    @property
    def is_plain(self) -> bool:
        """Whether the weight is stored just as it was."""
        return self.holds == "values" and not self.kept_only


def encode(raw: Bytes, dtype: str, shape: tuple[int, ...], layer: PrunedWeight) -> tuple[Form, Bytes]:
    """The smallest form that gives back `raw`, the weight's bytes, bit for bit, and the layer's bytes in that form.

    shape: (R, C), or (C, R) for a transposed layer. Raises ValueError if the mask has another shape.
    """
    weight = _rows_first(_tensor(raw, dtype).reshape(shape), layer.transposed)
    if weight.shape != layer.mask.shape:
        raise ValueError(f"{layer.key} is {tuple(weight.shape)}, its mask {tuple(layer.mask.shape)}")
    for form in _candidates(weight, layer):
        if form.is_plain:
            return form, raw
        try:
            data = _stored(weight, layer, form)
        except NumericalError:
            continue
        again = decode(form, data, dtype, shape, layer.transposed, layer.mask, layer.grid)
        if torch.equal(_words(again).reshape(-1), _words(_tensor(raw, dtype))):
            return form, data
    raise AssertionError("the plain form always fits")


def decode(
    form: Form,
    data: Bytes,
    dtype: str,
    shape: tuple[int, ...],
    transposed: bool,
    mask: Tensor | None,
    grid: Grid | None,
) -> Tensor:
    """The layer's weight in `shape`, from its bytes in `form`.

    mask: (R, C) bool, for a form of kept weights only. grid: for codes. Raises ValueError if the lengths do not fit.
    """
    if form.is_plain:
        return _tensor(data, dtype).reshape(shape)
    rows, cols = reversed(shape) if transposed else shape
    kept = ~mask if form.kept_only and mask is not None else torch.ones(rows, cols, dtype=torch.bool)
    num_stored = int(kept.sum())
    if form.holds == "values":
        weight = torch.zeros(rows, cols, dtype=FLOATS[dtype])
        values = _tensor(data, dtype)
        if len(values) != num_stored:
            raise ValueError(f"{len(values)} values are no {num_stored} kept weights")
        _words(weight)[kept] = _words(values)
    else:
        if grid is None:
            raise ValueError("codes without a grid")
        codes = torch.zeros(rows, cols)
        codes[kept] = unpack_codes(_tensor(data, "U8"), grid.bits, num_stored).float()
        weight = grid.values(codes).to(FLOATS[dtype])
        _words(weight)[~kept] = 0
    return weight.t().contiguous() if transposed else weight


def implied_mask(form: Form, weight: Tensor, transposed: bool) -> Tensor:
    """The (R, C) mask of a form that stores none, from the weight in the shape of the model's file."""
    weight = _rows_first(weight, transposed)
    if form.mask == "empty":
        return torch.zeros(weight.shape, dtype=torch.bool)
    return _words(weight) == 0


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _candidates(weight: Tensor, layer: PrunedWeight) -> list[Form]:
    """The forms that can hold this layer, the smallest first; of equals the plainest. The last resort is among them."""
    is_zero = _words(weight) == 0
    mask: Literal["stored", "zeros", "empty"] = "stored"
    if torch.equal(is_zero, layer.mask):
        mask = "zeros"
    elif not bool(layer.mask.any()):
        mask = "empty"
    forms = [Form("values", False, mask)]
    kept_is_enough = bool(is_zero[layer.mask].all())
    if kept_is_enough:
        forms.append(Form("values", True, "stored"))
    if layer.grid is not None:
        forms.append(Form("codes", False, mask))
        if kept_is_enough:
            forms.append(Form("codes", True, "stored"))
    return sorted(forms, key=lambda form: _size_bytes(form, weight, layer))


def _size_bytes(form: Form, weight: Tensor, layer: PrunedWeight) -> int:
    """How many bytes the layer takes with its mask (its grid is stored in any case)."""
    rows, cols = weight.shape
    num_stored = rows * cols - (int(layer.mask.sum()) if form.kept_only else 0)
    mask_bytes = rows * ((cols + 7) // 8) if form.mask == "stored" else 0
    if form.holds == "values":
        return num_stored * weight.element_size() + mask_bytes
    assert layer.grid is not None
    return packed_length(num_stored, layer.grid.bits) + mask_bytes


def _stored(weight: Tensor, layer: PrunedWeight, form: Form) -> memoryview:
    """The layer's bytes in `form`. Raises NumericalError if a weight is not on the grid."""
    kept = ~layer.mask if form.kept_only else torch.ones_like(layer.mask)
    if form.holds == "values":
        return raw_bytes(_words(weight)[kept])
    assert layer.grid is not None
    return raw_bytes(pack_codes(layer.grid.codes_of_stored(weight)[kept], layer.grid.bits))


def _tensor(data: Bytes, dtype: str) -> Tensor:
    """The bytes as a flat tensor, a view of them."""
    wanted = FLOATS.get(dtype, torch.uint8)
    if len(data) == 0:
        return torch.empty(0, dtype=wanted)
    if len(data) % wanted.itemsize:
        raise ValueError(f"{len(data)} bytes are no {dtype}")
    return torch.frombuffer(data, dtype=wanted)


def _rows_first(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t().contiguous() if transposed else weight


def _words(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers: 0 is +0.0 alone, and NaNs are equal or not by their bits."""
    return tensor.view(_WORDS[tensor.element_size()])
