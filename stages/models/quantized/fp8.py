"""FP8 with a scale for each block of a weight, as DeepSeek-V3 and Qwen3 are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.models.base import Weights
from stages.models.quantized.base import QuantizedFormat, Settings, expanded, require, require_scales

_CODES = {torch.float8_e4m3fn, torch.float8_e5m2}
# What the scale of X.weight may be called: X.weight_scale_inv, ... It multiplies, whatever its name says.
_OF_WEIGHT = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")


class Fp8(QuantizedFormat):
    """weight: e4m3 (R, C); scale: fp32, bf16, or powers of two as exponents (ue8m0)."""

    method = "fp8"
    dropped = QuantizedFormat.dropped | {"qscale_act", "k_scale", "v_scale"}

    def __init__(self, block: tuple[int, int] | None) -> None:
        self._block = block

    @classmethod
    def of(cls, settings: Settings) -> Self:
        require(settings, "expert_dtype", settings.get("expert_dtype", "fp8"), ("fp8",))
        block = settings.get("weight_block_size", (128, 128))
        if block is None:
            return cls(None)
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise UsageError(f"weight_block_size {block!r} in config.json is no size of blocks")
        return cls((block[0], block[1]))

    def parts(self, weights: Weights) -> dict[str, dict[str, str]]:
        found = {}
        for key in weights.keys:
            if weights.dtype(key) not in _CODES:
                continue
            stem = key.removesuffix("weight")
            names = [stem + name for name in _OF_WEIGHT] if stem != key else [f"{key}_scale_inv", f"{key}_scale"]
            scale = next((name for name in names if name in weights), None)
            if scale is None:
                raise UsageError(f"{key} is stored in FP8 without a scale ({names[0]}): the files are incomplete")
            found[key] = {"weight": key, "scale": scale}
        return found

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes, scale = parts["weight"].float(), parts["scale"]
        require_scales(scale, may_be_exponents=True)
        factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        return codes * expanded(factors, tuple(codes.shape), self._block)
