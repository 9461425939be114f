"""Estimated cost of a table of the paper on this machine: hours, disk, download."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.run_config import RunConfig
from stages.pruners.registry import reads_data

if TYPE_CHECKING:
    import torch

# Share of the best rate of matrix products that passes over blocks reach (docs/performance.md, P1).
_REACHED = 0.55
_FORWARD_BACKWARD = 3  # cost of forward and backward together, in forward passes


@dataclass(frozen=True)
class Scale:
    """Sizes of a model that an estimate needs."""

    num_blocks: int
    hidden: int
    block: int  # number of weights of a block
    download_bytes: int  # 0: it is on this machine
    task: str  # a name of `stages.tasks.registry.TASKS`
    tokens: int | None = None  # tokens of a sample, if the model fixes them


def _sam(num_blocks: int, hidden: int, megabytes: int) -> Scale:
    return Scale(num_blocks, hidden, 12 * hidden**2, megabytes * 1_000_000, "vision", 64 * 64)


def _opt(num_blocks: int, hidden: int, megabytes: int) -> Scale:
    return Scale(num_blocks, hidden, 12 * hidden**2, megabytes * 1_000_000, "language")


# The models of the paper's tables: an estimate does not need their files.
KNOWN = {
    "opt-125m": _opt(12, 768, 251),
    "opt-1.3b": _opt(24, 2048, 2_630),
    "opt-2.7b": _opt(32, 2560, 5_300),
    "opt-6.7b": _opt(32, 4096, 13_300),
    "llama-2-7b": Scale(32, 4096, 4 * 4096**2 + 3 * 4096 * 11_008, 13_480_000_000, "language"),
    "sam-vit-b": _sam(12, 768, 375),
    "sam-vit-l": _sam(24, 1024, 1_250),
    "sam-vit-h": _sam(32, 1280, 2_565),
}


@dataclass(frozen=True)
class Estimate:
    """Cost of the runs of one model."""

    num_runs: int
    seconds: float
    disk_bytes: int  # all finished runs, and one at its peak
    download_bytes: int


def scale_of(model: str) -> Scale:
    """Sizes of a model of the paper, which needs none of its files, or of any other.

    Raises:
        UsageError: There is no such model, or it cannot be pruned.
        ResourceError: Its files are out of reach.
    """
    if model in KNOWN:
        return KNOWN[model]
    from stages.models.aliases import WHEEL_ALIASES
    from stages.models.registry import open_model
    from stages.models.resolve import resolve

    opened = open_model(resolve(model))
    block = sum(opened.entry_sizes(0).values())
    download = 1_000_000 * WHEEL_ALIASES[model].size_mb if model in WHEEL_ALIASES else 0
    return Scale(opened.num_blocks, opened.hidden_size, block, download, opened.task, opened.fixed_tokens)


def estimate(scale: Scale, configs: Sequence[RunConfig], flops_per_s: float) -> Estimate:
    """Estimate the cost of runs of one model. flops_per_s: best rate of matrix products on this machine."""
    seconds = sum(_flops(scale, config) for config in configs) / (_REACHED * flops_per_s)
    weights = 4 * scale.num_blocks * scale.block
    streams = max((_stream_bytes(scale, config) for config in configs), default=0)
    return Estimate(len(configs), seconds, len(configs) * weights + 3 * streams, scale.download_bytes)


def _flops(scale: Scale, config: RunConfig) -> float:
    tokens = (config.num_samples or 0) * config.seqlen
    passes = 0.0
    if reads_data(config.method):
        passes = 2.0  # for the Hessians, and of the pruned block
    if config.is_lamp:
        passes += 1 + _FORWARD_BACKWARD * ((config.epochs or 0) + (config.refine_epochs or 0 if config.refine else 0))
    return 2.0 * scale.num_blocks * scale.block * tokens * passes


def _stream_bytes(scale: Scale, config: RunConfig) -> int:
    return (config.num_samples or 0) * config.seqlen * scale.hidden * 4


@functools.cache
def best_rate(device: torch.device) -> float:
    """Measure the FLOP per second of a matrix product: fp32 on a processor, bf16 on a GPU."""
    import torch

    from stages.machine.autotune import best_of

    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        (left @ right).sum().item()

    return 2.0 * size**3 / best_of(product, 5)
