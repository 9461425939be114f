"""How a device computes: precision, threads and determinism, chosen once and then kept.

A run that is resumed must compute with the choices it began with, or its last bits differ; so the choices
are a record (`DeviceChoices`) that the caller stores and applies again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.errors import ResourceError, UsageError
from stages.machine.autotune import tuned

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Tokenizers, stores and the like, which are loaded after a run has been prepared (SmolLM2-135M: 990 MB measured in
# pruning, where 840 were worked out without it).
_LOADED_LATER = 150_000_000

# Samples share a forward pass up to so many tokens. A GPU is kept busy by a few thousand, and more would take more
# memory than training a block does; on a processor nothing is gained above a few hundred (docs/performance.md).
_BATCH_TOKENS = {"cuda": 4096, "cpu": 256}


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
    compiles: bool = False  # the training step by torch.compile

    @property
    def torch_device(self) -> torch.device:
        """The device as torch wants it."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations as torch wants it."""
        return DTYPES[self.dtype]


def choose(device: str = "auto", dtype: str = "auto", threads: int | None = None) -> DeviceChoices:
    """Resolve "auto", and find the number of threads and the path of fp32 products that are fastest here (`autotune`).

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
        return DeviceChoices(str(chosen), dtype, threads or torch.get_num_threads(), "highest", name)
    tuning = tuned(_processor_name(), threads)
    return DeviceChoices("cpu", dtype, tuning.num_threads, tuning.matmul_precision, _processor_name())


def require_compiler(device: torch.device) -> None:
    """Raise UsageError where torch.compile would find nothing to compile with."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise UsageError("--compile needs a C++ compiler: install g++ or clang++, name one by CXX, or leave it out")


def micro_batches(device: torch.device, tokens: int, wanted: int | None = None) -> list[int]:
    """How many samples of so many tokens may share a forward pass where nothing is trained: what to try, rising."""
    if wanted is not None:
        return [wanted]
    most = max(_BATCH_TOKENS[device.type] // tokens, 1)
    return [2**k for k in range(most.bit_length())]


def memory_in_use(device: torch.device) -> int:
    """Bytes that are taken before a model is: of the process; on a GPU, whose context nobody counts, none."""
    return 0 if device.type == "cuda" else _from_status("VmRSS") + _LOADED_LATER


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


def release_memory(device: torch.device) -> None:
    """Give back what the work before has left, so that it does not stand beside what comes next.

    Modules, callbacks and optimizers refer to each other in circles, which only the collector breaks; and the C library
    keeps pieces of up to 32 MB for later, some 400 MB of them with blocks of 100 MB, unless it is asked for them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's has nothing to ask
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _from_status(field: str) -> int:
    """A number of bytes that Linux says of this process; 0 elsewhere."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """The most memory used since the object was made, of the process and of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_reset = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:  # Linux forgets a process's old peak when asked; elsewhere the peak covers its whole life
            Path("/proc/self/clear_refs").write_text("5")
            self._is_reset = True
        except OSError:
            self._is_reset = False

    def device_bytes(self) -> int | None:
        """Of the GPU's memory; None on a CPU, whose memory is the process's."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def process_bytes(self) -> int:
        """Of the machine's memory: resident pages, those of mapped files among them."""
        if self._is_reset:
            return _from_status("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
