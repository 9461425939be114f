"""Autotuning: the number of threads and the precision mode that make fp32 matrix products fastest on this machine.

The choice decides the last bits of a result. A run therefore stores it in run.json, and all runs on one machine share
one measurement, which is in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from stages.machine.cache import machine_cache_dir

# Largest accepted relative error of an fp32 product of these sizes. Plain fp32 accumulation has about 3e-7, reduced
# precision (TF32, bf16) more than 1e-4.
_FP32_PRODUCT_ERROR = 3e-6
_ROWS, _COLS = 256, 1024
_ROUNDS, _REPEATS = 6, 3
# Another choice than the default must take at most this share of its time, so that noise does not decide.
_MARGIN = 0.95
# Values outside these limits are measured again.
_MOST_THREADS = 1024
_PRECISIONS = ("highest", "medium")


@dataclass(frozen=True)
class Tuning:
    """Number of threads and precision mode of matrix products."""

    num_threads: int
    matmul_precision: str  # torch.set_float32_matmul_precision


def tuned(processor: str, num_threads: int | None = None) -> Tuning:
    """Find the fastest choice with full fp32 accuracy. Measures it once per machine, in less than a second.

    Args:
        processor: model name of the processor.
        num_threads: a fixed number. Default: OMP_NUM_THREADS if set, else measured.
    """
    available = torch.get_num_threads()
    if num_threads is None and os.environ.get("OMP_NUM_THREADS"):
        num_threads = available
    key = f"{processor}, {available} threads, {num_threads or 'any'}, torch {torch.__version__}"
    path = machine_cache_dir() / "tuning.json"
    known = _read(path)
    if key not in known:
        known[key] = _measure([num_threads] if num_threads else _fewer(available))
        _write(path, known)
    return known[key]


def _fewer(available: int) -> list[int]:
    """Candidates: all threads, half of them (one per core with two threads each), one."""
    return list(dict.fromkeys((available, max(available // 2, 1), 1)))


def _measure(thread_counts: list[int]) -> Tuning:
    """Find the fastest candidate. The default is the first count with "highest".

    The candidates are timed in turn for some rounds, and the best time of each counts. Otherwise a disturbance during
    one of them would decide.
    """
    with _settings_restored():
        seconds = dict.fromkeys(_accurate(thread_counts), math.inf)
        for _ in range(_ROUNDS):
            for candidate in seconds:
                _set(candidate)
                seconds[candidate] = min(seconds[candidate], _product_s())
    best = next(iter(seconds))
    for candidate in seconds:
        if seconds[candidate] < _MARGIN * seconds[best]:
            best = candidate
    return best


def _accurate(thread_counts: list[int]) -> list[Tuning]:
    """Candidates whose products have fp32 accuracy, the default first."""
    found = []
    for num_threads in thread_counts:
        for precision in _PRECISIONS:
            candidate = Tuning(num_threads, precision)
            _set(candidate)
            if precision == "highest" or product_error() <= _FP32_PRODUCT_ERROR:
                found.append(candidate)
    return found


def _set(tuning: Tuning) -> None:
    torch.set_num_threads(tuning.num_threads)
    torch.set_float32_matmul_precision(tuning.matmul_precision)


def product_error() -> float:
    """Relative error of an fp32 product with torch's present settings. On some processors "medium" means bf16."""
    left, right = _operands()
    exact = left.double() @ right.double()
    return ((left @ right - exact).norm() / exact.norm()).item()


def _product_s() -> float:
    left, right = _operands()
    return best_of(lambda: left @ right, _REPEATS)


def best_of(work: Callable[[], object], repeats: int) -> float:
    """Shortest time of `work` in seconds, after one call to warm up."""
    work()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_ROWS, _COLS, generator=generator), torch.randn(_COLS, _COLS, generator=generator)


@contextlib.contextmanager
def _settings_restored() -> Iterator[None]:
    num_threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(precision)


def _read(path: Path) -> dict[str, Tuning]:
    try:
        found = {key: Tuning(**value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: tuning for key, tuning in found.items() if _is_plausible(tuning)}


def _is_plausible(tuning: Tuning) -> bool:
    is_count = type(tuning.num_threads) is int and 0 < tuning.num_threads <= _MOST_THREADS
    return is_count and tuning.matmul_precision in _PRECISIONS


def _write(path: Path, known: dict[str, Tuning]) -> None:
    """Store the measurements. If the cache is not writable, the next run measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps({key: asdict(tuning) for key, tuning in known.items()}, indent=1) + "\n")
        temporary.replace(path)
