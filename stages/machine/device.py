"""Device settings: precision, threads and determinism, chosen once per run.

A resumed run must use the choices that it began with, or its last bits differ. The choices are therefore a record
(`DeviceChoices`) that the caller stores and applies again.
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stages.errors import ResourceError, UsageError
from stages.machine.autotune import tuned
from stages.machine.cgroups import memory_left

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What PyTorch's errors say in strict mode, after the name of the operation.
_NOT_DETERMINISTIC = "does not have a deterministic implementation"

# Bytes of modules that are imported after the memory was planned, such as tokenizers and stores (SmolLM2-135M: 990 MB
# measured while pruning, 840 MB planned without this term).
_LOADED_LATER = 150_000_000

# Share of the free memory that a step takes where more memory only saves time.
_SHARE_TAKEN = 0.9

# Most tokens per forward pass. A few thousand keep a GPU busy, and more would take more memory than training a block.
# A processor gains nothing above a few hundred (docs/performance.md).
_BATCH_TOKENS = {"cuda": 4096, "cpu": 256}


@dataclass(frozen=True)
class DeviceChoices:
    """Device settings that decide the last bits of a result."""

    device: str  # "cpu", "cuda:0"
    dtype: str  # arithmetic of forward and backward passes, and dtype of stored activations
    num_threads: int
    matmul_precision: str  # torch.set_float32_matmul_precision
    device_name: str  # model name of the processor or GPU, for messages
    # Tokens per forward pass without training, in whole samples, at least one.
    batch_tokens: int = 0
    compiles: bool = False  # whether torch.compile compiles the training step
    train_dtype: str | None = None  # arithmetic of training steps; None: `dtype`

    @property
    def torch_device(self) -> torch.device:
        """The device as a torch.device."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations as a torch.dtype."""
        return DTYPES[self.dtype]

    @property
    def torch_train_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic of training steps as a torch.dtype."""
        return DTYPES[self.train_dtype or self.dtype]

    def training_in(self, train_dtype: str) -> DeviceChoices:
        """These choices with the arithmetic of training steps as the user wants it; "auto": as it is.

        Raises:
            UsageError: This device does not have it.
        """
        if train_dtype == "float16" and self.torch_device.type == "cpu":
            raise UsageError("--train-dtype float16 needs a GPU: on a CPU choose float32 or bfloat16")
        if train_dtype == "auto":
            return self
        return replace(self, train_dtype=None if train_dtype == self.dtype else train_dtype)


def choose(device: str = "auto", dtype: str = "auto", threads: int | None = None) -> DeviceChoices:
    """Resolve "auto", and choose the number of threads and the precision mode that are fastest here (`autotune`).

    dtype "auto": streams, Hessians and forward passes in fp32, because bf16 costs one-shot pruning 6 to 23% of its
    perplexity (docs/performance.md); training steps in bf16 on a GPU that has it.

    Raises:
        UsageError: the device or dtype does not exist.
        ResourceError: there is no such GPU.
    """
    chosen = _resolve_device(device)
    train_dtype = None
    if dtype == "auto":
        dtype = "float32"
        # Emulated bf16, as on a T4, is slower than fp32.
        if chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            train_dtype = "bfloat16"
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose auto, {', '.join(DTYPES)}")
    if dtype == "float16" and chosen.type == "cpu":
        raise UsageError("--dtype float16 needs a GPU: on a CPU choose float32 or bfloat16")
    if chosen.type == "cuda":
        # TF32 would cost the Hessians and solves their last 13 bits.
        name = torch.cuda.get_device_name(chosen)
        num_threads = threads or torch.get_num_threads()
        return DeviceChoices(str(chosen), dtype, num_threads, "highest", name, train_dtype=train_dtype)
    tuning = tuned(_processor_name(), threads)
    return DeviceChoices("cpu", dtype, tuning.num_threads, tuning.matmul_precision, _processor_name())


def require_compiler(device: torch.device) -> None:
    """Raise UsageError if torch.compile would find no C++ compiler."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise UsageError("--compile needs a C++ compiler: install g++ or clang++, name one by CXX, or leave it out")


def micro_batches(device: torch.device, tokens: int, wanted: int | None = None) -> list[int]:
    """Numbers of samples per forward pass to try, in rising order, for samples of `tokens` tokens without training."""
    if wanted is not None:
        return [wanted]
    most = max(_BATCH_TOKENS[device.type] // tokens, 1)
    return [2**k for k in range(most.bit_length())]


def memory_in_use(device: torch.device) -> int:
    """Baseline memory before the model is loaded, in bytes: process RSS on CPU, 0 on GPU."""
    return 0 if device.type == "cuda" else _from_status("VmRSS") + _LOADED_LATER


def memory_available(device: torch.device) -> int:
    """Bytes of memory that this process may take, what it holds already included: 90% of what is free.

    In a container that has less than the machine (`stages.machine.cgroups`), of what is free there.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(_SHARE_TAKEN * (free + torch.cuda.memory_reserved(device)))
    import psutil

    free, left = psutil.virtual_memory().available, memory_left()
    return _from_status("VmRSS") + int(_SHARE_TAKEN * (free if left is None else min(free, left)))


def name_of(device: str) -> str | None:
    """Model name of a device of this machine; None if there is no such device."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return _processor_name()
    if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_name(chosen)


def apply(choices: DeviceChoices) -> None:
    """Apply the choices to this process. Raises ResourceError if the device does not exist any more."""
    if choices.torch_device.type == "cuda":
        torch.cuda.set_device(_resolve_device(choices.device))
        # cuBLAS reads this when its handle is made. Without it, results may differ from call to call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
    torch.set_num_threads(choices.num_threads)
    torch.set_float32_matmul_precision(choices.matmul_precision)
    # Warn only: some models use operations without a deterministic form whose results are exact anyway (OPT counts
    # positions by a cumulative sum of ones).
    torch.use_deterministic_algorithms(True, warn_only=True)
    # No code reads memory before writing it. Filling it first would take a sixth of the time in bf16.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def computing(choices: DeviceChoices, *, trains: bool = False) -> Iterator[None]:
    """Compute forward passes inside in the chosen dtype. Weights stay in fp32. trains: in that of training steps."""
    dtype = choices.torch_train_dtype if trains else choices.torch_dtype
    if dtype == torch.float32:
        yield
    else:
        with torch.autocast(choices.torch_device.type, dtype):
            yield


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Train inside: on a GPU, forward and backward passes give the same bits each time.

    `apply` only warns of operations without a deterministic form. In that mode PyTorch also uses the backward passes of
    flash attention and of cuDNN's attention that add in any order. Strict mode excludes these.

    Raises:
        UsageError: An operation has no deterministic form on this GPU.
    """
    if device.type != "cuda":
        yield
        return
    from torch._inductor import config as inductor

    is_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    has_cudnn_attention, is_inductor_strict = torch.backends.cuda.cudnn_sdp_enabled(), inductor.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    inductor.deterministic = True
    try:
        yield
    except RuntimeError as error:
        if _NOT_DETERMINISTIC not in str(error):
            raise
        operation = str(error).partition(_NOT_DETERMINISTIC)[0].strip()
        raise UsageError(
            f"{operation} has no deterministic form on this GPU: a resumed training would give other weights. "
            "Train on a processor (--device cpu), or use a method that trains nothing (--method alps)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=only_warns)
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn_attention)
        inductor.deterministic = is_inductor_strict


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
    """Fields of the first processor in /proc/cpuinfo; empty on other systems than Linux."""
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
    """Return unused memory to the device and the system.

    Modules, callbacks and optimizers form reference cycles, which only the garbage collector frees. The C library
    keeps freed pieces of up to 32 MB (about 400 MB with blocks of 100 MB) until malloc_trim.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # C libraries other than GNU's have no malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _from_status(field: str) -> int:
    """A size in /proc/self/status in bytes; 0 on other systems than Linux."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Peak memory of the process and of the GPU since the object was created."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_reset = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:  # resets the peak on Linux; elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
            self._is_reset = True
        except OSError:
            self._is_reset = False

    def device_bytes(self) -> int | None:
        """Peak GPU memory in bytes; None on a CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    def process_bytes(self) -> int:
        """Peak resident memory of the process in bytes, mapped files included."""
        if self._is_reset:
            return _from_status("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
