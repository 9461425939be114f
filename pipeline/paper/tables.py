"""The paper's tables and figures: models, methods, settings and data sets of their cells."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from stages.pruners.registry import bit_methods

if TYPE_CHECKING:
    from pydantic import JsonValue

_METHODS = ("magnitude", "wanda", "sparsegpt", "lamp")
_OPT = ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b")
_SAM = ("sam-vit-b", "sam-vit-l", "sam-vit-h")
_LLAMA = ("llama-2-7b",)
_SPARSITIES = tuple(f"{share}%" for share in range(10, 100, 10))
_PATTERNS = ("2:4", "4:8", "2:4+int3", "2:4+int4", "4:8+int3", "4:8+int4")
_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mean")


@dataclass(frozen=True)
class Table:
    """One of the paper's tables or figures."""

    name: str  # "table1", "fig3"
    title: str
    metric: str  # "perplexity", "iou", "accuracy", "gpu_memory_gb"
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    strategies: tuple[str, ...]  # the columns, named as in the paper
    base: tuple[tuple[str, Any], ...] = ()  # settings that all runs share

    @property
    def is_figure(self) -> bool:
        """Whether it is a figure, for which the paper has no numbers."""
        return self.name.startswith("fig")


def _alphas(*values: str) -> tuple[str, ...]:
    return tuple(f"alpha={value}" for value in values)


_ALPHAS = _alphas("0.5", "0.6", "0.7", "0.8", "0.9", "1.0")
_BETAS = tuple(f"beta={value}" for value in ("0.0", "0.1", "0.2", "0.3", "0.4"))
_SIZES = tuple(f"num_samples={count}" for count in (16, 32, 64, 128, 256))
_AT_70, _AT_90 = (("sparsity", 0.7),), (("sparsity", 0.9),)
_BOTH_TEXTS, _BOTH_IMAGES, _ONLY_LAMP = ("wikitext2", "ptb"), ("sa1b", "coco"), ("lamp",)
_BASE_OPT, _BASE_SAM = ("opt-125m",), ("sam-vit-b",)

TABLES = {
    table.name: table
    for table in (
        Table("table1", "OPT on WikiText-2", "perplexity", _OPT, ("wikitext2",), _METHODS, _SPARSITIES),
        Table("table2", "OPT on PTB", "perplexity", _OPT, ("ptb",), _METHODS, _SPARSITIES),
        Table("table3", "Llama-2-7B, zero-shot", "accuracy", _LLAMA, _TASKS, _METHODS, ("50%", "70%")),
        Table("table4", "SAM on SA-1B", "iou", _SAM, ("sa1b",), _METHODS, _SPARSITIES),
        Table("table5", "SAM on COCO", "iou", _SAM, ("coco",), _METHODS, _SPARSITIES),
        Table("table6", "GPU memory, OPT-6.7B", "gpu_memory_gb", ("opt-6.7b",), ("",), _METHODS[1:], ("",), _AT_70),
        Table("table7", "OPT, N:M and int3, int4", "perplexity", _OPT, _BOTH_TEXTS, _METHODS[1:], _PATTERNS),
        Table("table8", "Llama-2-7B, N:M and int3, int4", "accuracy", _LLAMA, _TASKS, _METHODS[1:], _PATTERNS),
        Table("table9", "SAM, N:M and int3, int4", "iou", _SAM, _BOTH_IMAGES, _METHODS[1:], _PATTERNS),
        Table("fig3", "OPT-125M at 70% by alpha", "perplexity", _BASE_OPT, _BOTH_TEXTS, _ONLY_LAMP, _ALPHAS, _AT_70),
        Table("fig4", "SAM-B at 90% by alpha", "iou", _BASE_SAM, _BOTH_IMAGES, _ONLY_LAMP, _ALPHAS, _AT_90),
        Table("fig5", "OPT-125M at 70% by beta", "perplexity", _BASE_OPT, _BOTH_TEXTS, _ONLY_LAMP, _BETAS, _AT_70),
        Table("fig6", "SAM-B at 90% by beta", "iou", _BASE_SAM, _BOTH_IMAGES, _ONLY_LAMP, _BETAS, _AT_90),
        Table("fig7", "OPT-125M at 70% by samples", "perplexity", _BASE_OPT, _BOTH_TEXTS, _ONLY_LAMP, _SIZES, _AT_70),
        Table("fig8", "SAM-B at 90% by samples", "iou", _BASE_SAM, _BOTH_IMAGES, _ONLY_LAMP, _SIZES, _AT_90),
    )
}


def table_named(name: str) -> Table:
    """Find a table or figure by name. Raises ConfigError that lists the names."""
    if name not in TABLES:
        raise ConfigError(f"{name}: the paper has no such table; choose one of {', '.join(TABLES)}")
    return TABLES[name]


def settings_of(table: Table, strategy: str, method: str) -> dict[str, JsonValue] | None:
    """Settings of a cell's run; None if the method does not support them (Wanda cannot quantize)."""
    settings = {**dict(table.base), "method": method}
    if "=" in strategy:
        field, _, value = strategy.partition("=")
        return {**settings, field: value}
    if not strategy:
        return settings
    goal, _, bits = strategy.partition("+int")
    if bits and method not in bit_methods():
        return None
    settings |= {"pattern": goal} if ":" in goal else {"sparsity": float(goal.rstrip("%")) / 100}
    return settings | ({"bits": int(bits)} if bits else {})


def require_columns(table: Table, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The requested columns in the paper's order; all by default. Raises ConfigError."""
    if not wanted:
        return table.strategies
    named = {_column(name, table) for name in wanted}
    return tuple(strategy for strategy in table.strategies if strategy in named)


def require_methods(table: Table, wanted: Sequence[str]) -> Table:
    """The table with the requested methods; all by default. Raises ConfigError."""
    unknown = [name for name in wanted if name not in table.methods]
    if unknown:
        raise ConfigError(f"{table.name} has no method {unknown[0]}: choose from {', '.join(table.methods)}")
    return replace(table, methods=tuple(m for m in table.methods if m in wanted)) if wanted else table


def _column(name: str, table: Table) -> str:
    candidates = [name.strip()]
    with contextlib.suppress(ValueError):
        candidates.append(f"{100 * float(name):g}%")
    for candidate in candidates:
        for strategy in table.strategies:
            if candidate == strategy or candidate == strategy.partition("=")[2]:
                return strategy
    raise ConfigError(f"{table.name} has no column {name}: choose from {', '.join(table.strategies)}")


@lru_cache
def published() -> dict[tuple[str, str, str, str, str], float]:
    """All numbers of the paper's tables by (table, model, dataset, method, strategy).

    Accuracies and IoU in percent, memory in GB.
    """
    with resources.files(__package__).joinpath("results.csv").open(encoding="utf-8") as file:
        return {
            (f"table{row['table']}", row["model"], row["dataset"], row["method"], row["strategy"]): float(row["value"])
            for row in csv.DictReader(file)
        }
