"""The names of registries in the help of settings, so that the entries of other packages are shown.

Help takes names only, and imports no entry: it must appear at once. So it repeats what the classes of the built-in
entries say (`lamp_pruners`, `source_forms`); a test compares both.
"""

from __future__ import annotations

from stages.data.registry import DATA_SOURCES
from stages.metrics.registry import METRICS
from stages.pruners.registry import PRUNERS
from stages.registry import Registry

_LAMP_PRUNERS = "sparsegpt (as in the paper) or alps"
_SOURCES = (
    "c4, wikitext2, ptb (from the hub, or a local copy as in c4:PATH), pydocs, text:PATH, jsonl:FILE, "
    "parquet:FILE, hf:REPO (docs/data.md); for images sa1b:DIR, coco:DIR, images:DIR"
)


def filled(text: str, *, builtin_only: bool) -> str:
    """A help text with the names in the place of each ``{...}``.

    Args:
        text: It may hold {methods}, {lamp_pruners}, {data_sources}, {more_sources} and {more_metrics}.
        builtin_only: Leave out the entries of other packages, for documents that do not depend on the machine.
    """
    if "{" not in text:
        return text

    def others(registry: Registry) -> tuple[str, ...]:
        return () if builtin_only else registry.added_names

    sources, metrics = others(DATA_SOURCES), others(METRICS)
    return text.format(
        methods=any_of((*PRUNERS.builtin_names, *others(PRUNERS))),
        lamp_pruners=_LAMP_PRUNERS + _added(others(PRUNERS), ", if LAMP can use them"),
        data_sources=_SOURCES + _added(sources),
        more_sources=_added(sources),
        more_metrics=f": {any_of(metrics)}" if metrics else "",
    )


def _added(names: tuple[str, ...], condition: str = "") -> str:
    return f"; of installed packages{condition}: {', '.join(names)}" if names else ""


def any_of(names: tuple[str, ...]) -> str:
    """ "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
