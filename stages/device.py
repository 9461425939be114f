"""How a device computes: precision, threads and determinism, chosen once and then kept.

A run that is resumed must compute with the choices it began with, or its last bits differ; so the choices
are a record (`DeviceChoices`) that the caller stores and applies again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.errors import ResourceError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The relative error that an fp32 product of these sizes may have. Plain fp32 accumulation stays near 3e-7;
# anything reduced (TF32, bf16) is above 1e-4.
_FP32_PRODUCT_ERROR = 3e-6
_PROBE_ROWS, _PROBE_COLS = 256, 1024


@dataclass(frozen=True)
class DeviceChoices:
    """Everything about the device that decides the last bits of a result."""

    device: str  # "cpu", "cuda:0"
    dtype: str  # arithmetic of forward and backward passes, and dtype of stored activations
    num_threads: int
    matmul_precision: str  # torch.set_float32_matmul_precision
    device_name: str  # for people: what the machine calls itself
    # Tokens that share a forward pass where nothing is trained, as whole samples, at least one.
    batch_tokens: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device as torch wants it."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations as torch wants it."""
        return DTYPES[self.dtype]


def choose(device: str = "auto", dtype: str = "auto") -> DeviceChoices:
    """Resolve "auto" and find the fastest fp32 matrix product of full fp32 accuracy.

    Raises UsageError for a device or dtype that does not exist, ResourceError for a GPU that is not there.
    """
    chosen = _resolve_device(device)
    if dtype == "auto":
        on_gpu = chosen.type == "cuda"
        dtype = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose auto, {', '.join(DTYPES)}")
    if dtype == "float16" and chosen.type == "cpu":
        raise UsageError("--dtype float16 needs a GPU: on a CPU choose float32 or bfloat16")
    if chosen.type == "cuda":
        # TF32 would cost the Hessians and solves their last 13 bits.
        name = torch.cuda.get_device_name(chosen)
        return DeviceChoices(str(chosen), dtype, torch.get_num_threads(), "highest", name)
    return DeviceChoices("cpu", dtype, torch.get_num_threads(), _fp32_precision(), _processor_name())


def name_of(device: str) -> str | None:
    """What a device of this machine calls itself; None if there is no such device."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return _processor_name()
    if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_name(chosen)


def apply(choices: DeviceChoices) -> None:
    """Make this process compute as `choices` says. Raises ResourceError if the device is gone."""
    if choices.torch_device.type == "cuda":
        _resolve_device(choices.device)
        # cuBLAS reads this when its handle is made; without it, its results may differ from call to call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        # The memory-efficient attention's backward pass adds atomically, in no fixed order.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.set_num_threads(choices.num_threads)
    torch.set_float32_matmul_precision(choices.matmul_precision)
    # Warn only: some models' own forward has operations without a deterministic form whose result is exact all
    # the same (OPT counts positions by a cumulative sum of ones).
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nobody reads memory before it is written; filling it first would take a sixth of the time in bf16.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def computing(choices: DeviceChoices) -> Iterator[None]:
    """Forward and backward passes inside compute in the chosen dtype (weights stay in fp32)."""
    if choices.torch_dtype == torch.float32:
        yield
    else:
        with torch.autocast(choices.torch_device.type, choices.torch_dtype):
            yield


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: choose auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise UsageError(f"--device {device}: only cpu and cuda are supported")
    index = chosen.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ResourceError(f"--device {device}: no such GPU here; use --device cpu or a machine with one")
    return torch.device("cuda", index)


def _fp32_precision() -> str:
    """ "medium" where that is faster at full fp32 accuracy, else "highest".

    On AMD processors MKL takes a slow path for fp32 products and "medium" moves them to oneDNN at the same
    error. Where the processor has matrix units for bf16 it means reduced precision: the error is measured.
    The rule looks at no clock, so that two runs on one machine never choose differently.
    """
    if "AuthenticAMD" not in _processor_facts().get("vendor_id", ""):
        return "highest"
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_PROBE_ROWS, _PROBE_COLS, generator=generator)
    right = torch.randn(_PROBE_COLS, _PROBE_COLS, generator=generator)
    exact = left.double() @ right.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        error = ((left @ right - exact).norm() / exact.norm()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error < _FP32_PRODUCT_ERROR else "highest"


def _processor_facts() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def _processor_name() -> str:
    return _processor_facts().get("model name") or platform.processor() or platform.machine()


class PeakMemory:
    """The most memory used since the object was made: of the GPU if there is one, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_reset = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:  # Linux forgets a process's old peak when asked; elsewhere the peak covers its whole life
            Path("/proc/self/clear_refs").write_text("5")
            self._is_reset = True
        except OSError:
            self._is_reset = False

    def bytes(self) -> int:
        """Peak memory in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._is_reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
