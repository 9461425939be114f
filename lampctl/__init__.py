"""lampctl: prune a large transformer block by block, as a resumable job.

    model, report = lampctl.prune(model, "pydocs", tokenizer=tokenizer, sparsity=0.7)    a model in memory
    run = lampctl.run("opt-125m", sparsity=0.7)                                          a run on disk, resumable
    run = lampctl.open_run("runs/opt-125m-s70-lamp")                                     one that exists

docs/api.md has more. Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.version import VERSION

if TYPE_CHECKING:
    from lampctl.api import Run, open_run, run
    from lampctl.pruning import Pruned, PruneReport, prune

__version__ = VERSION
__all__ = ["PruneReport", "Pruned", "Run", "__version__", "open_run", "prune", "run"]

_WHERE = {
    "Run": "lampctl.api",
    "open_run": "lampctl.api",
    "run": "lampctl.api",
    "PruneReport": "lampctl.pruning",
    "Pruned": "lampctl.pruning",
    "prune": "lampctl.pruning",
}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    if name in _WHERE:
        import importlib

        found = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'lampctl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
