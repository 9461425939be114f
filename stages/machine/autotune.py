"""How fast this machine multiplies, measured once: how many threads, and which path fp32 products take.

The choice decides the last bits of a result, so it is not made anew each time: a run keeps its own in run.json, and
runs on one machine share what the first of them measured, in the user's cache folder.
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

# The relative error that an fp32 product of these sizes may have. Plain fp32 accumulation stays near 3e-7;
# anything reduced (TF32, bf16) is above 1e-4.
_FP32_PRODUCT_ERROR = 3e-6
_ROWS, _COLS = 256, 1024
_ROUNDS, _REPEATS = 6, 3
# What is not the usual must be so much faster: noise alone must not decide.
_MARGIN = 0.95
# A half-written or strange file is measured over, never trusted.
_MOST_THREADS = 1024
_PRECISIONS = ("highest", "medium")


@dataclass(frozen=True)
class Tuning:
    """What was chosen."""

    num_threads: int
    matmul_precision: str  # torch.set_float32_matmul_precision


def tuned(processor: str, num_threads: int | None = None) -> Tuning:
    """The fastest choice of full fp32 accuracy on this machine; measured, in under a second, if nobody has yet.

    processor: what it calls itself. num_threads: fixed, by the user; else by OMP_NUM_THREADS; else measured as well.
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
    """All threads, one for every two (the second of a core seldom helps), one."""
    return list(dict.fromkeys((available, max(available // 2, 1), 1)))


def _measure(thread_counts: list[int]) -> Tuning:
    """The fastest; the first count and "highest" unless another is clearly faster.

    The candidates take turns, round after round, and each is judged by its best: a disturbance that lasts for one of
    them would decide for another.
    """
    with _as_it_was():
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
    """All candidates whose products have the accuracy of fp32, the usual one first."""
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
    """The relative error of an fp32 product as torch is set now: on some processors "medium" means bf16."""
    left, right = _operands()
    exact = left.double() @ right.double()
    return ((left @ right - exact).norm() / exact.norm()).item()


def _product_s() -> float:
    left, right = _operands()
    return best_of(lambda: left @ right, _REPEATS)


def best_of(work: Callable[[], object], repeats: int) -> float:
    """Seconds that `work` takes when least disturbed, after one call to warm up."""
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
def _as_it_was() -> Iterator[None]:
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
    return {key: tuning for key, tuning in found.items() if _makes_sense(tuning)}


def _makes_sense(tuning: Tuning) -> bool:
    is_count = type(tuning.num_threads) is int and 0 < tuning.num_threads <= _MOST_THREADS
    return is_count and tuning.matmul_precision in _PRECISIONS


def _write(path: Path, known: dict[str, Tuning]) -> None:
    """Keep it for the next run; where the cache cannot be written, that one measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps({key: asdict(tuning) for key, tuning in known.items()}, indent=1) + "\n")
        temporary.replace(path)
