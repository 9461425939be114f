"""Settings of torch that hold for the whole process: changed for a piece of work, and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from stages.machine.device import DeviceChoices, apply


@contextlib.contextmanager
def applied(device: DeviceChoices) -> Iterator[None]:
    """Inside, torch computes as the device choices say; afterwards as before."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches = [(place, name, getattr(place, name)) for place, name in _switches()]
    efficient_attention = torch.backends.cuda.mem_efficient_sdp_enabled()
    try:
        apply(device)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient_attention)
        for place, name, value in switches:
            setattr(place, name, value)
        # After allow_tf32, which changes a part of it: torch refuses to read a precision that is set in parts.
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def usual_modes() -> Iterator[None]:
    """Inside, torch keeps gradients, casts nothing by itself and makes fp32 tensors, whatever the caller set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _switches() -> list[tuple[Any, str]]:
    """Settings of torch that `stages.machine.device.apply` changes by assignment: where each is, its name."""
    return [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ]
