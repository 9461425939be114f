"""docs/models.md, made of the table of the census."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from stages.models.base import BlockModel
from stages.models.in_memory import open_in_memory
from stages.models.layer_roles import VITAL
from stages.models.registry import open_model
from stages.models.resolve import resolve
from tests.census.configuration import Configuration
from tests.census.families import CENSUS
from tests.census.verdicts import NOT_TAKEN

_INTRODUCTION = """# Models

What lampctl does with each model family of transformers {version}. The census (`tests/census`) takes a tiny
configuration of each through `lampctl run` with LAMP and Wanda, kills and resumes the run, and checks the exported
model: its names, the weights outside the blocks, the masks, and that transformers opens it whole and computes the same
logits, or features of a picture. `make soak` runs all of it, `make test` one family of each kind. This page is made by
`python -m tests.census > docs/models.md`; a test says when it is stale.

{counts}

- **works**: all steps, and every check holds.
- **refused**: lampctl says why and exits with 2 before any work.

A layer with a known role can exchange sparsity with others (`--beta`); one without is pruned all the same. Layers that
stay dense are small projections that steer a whole block; `--prune-all` prunes them, too.

| family | kind | | known roles | without a role | stay dense | notes |
|---|---|---|---|---|---|---|
"""
_NOT_TAKEN = """
## Not in the census

Other types of causal language models in transformers. lampctl opens them or says why not, and no test runs them.

"""


def models_page() -> str:
    """The text of the page."""
    from transformers import __version__

    words = Counter(entry.verdict.word for entry in CENSUS)
    counts = ", ".join(f"{words[word]} {word}" for word in ("works", "refused"))
    counts = f"{len(CENSUS)} configurations: {counts}."
    rows = "".join(row_of(entry) for entry in CENSUS)
    return _INTRODUCTION.format(version=__version__, counts=counts) + rows + _NOT_TAKEN + _others()


def _others() -> str:
    reasons = {reason: [name for name, other in NOT_TAKEN.items() if other == reason] for reason in NOT_TAKEN.values()}
    return "".join(f"- {', '.join(names)}: {reason}.\n" for reason, names in reasons.items())


def row_of(entry: Configuration) -> str:
    """Its line of the table."""
    cells = [entry.name, entry.kind, entry.verdict.word, *_layers(entry), entry.verdict.reason]
    return f"| {' | '.join(cells)} |\n"


def _layers(entry: Configuration) -> tuple[str, str, str]:
    """Known roles, layers without one, layers that stay dense."""
    if entry.verdict.word != "works":
        return "", "", ""
    known, unknown, dense = [], [], []
    model = _opened(entry)
    for layer in (layer for index in range(model.num_blocks) for layer in model.layers(index)):
        name = layer.path.rpartition(".")[2]
        if layer.role is None:
            unknown.append(f"`{name}`")
        elif layer.role == VITAL:
            dense.append(f"`{name}`")
        else:
            known.append(layer.role)
    # Each once, in the order of the module.
    known, unknown, dense = (list(dict.fromkeys(names)) for names in (known, unknown, dense))
    return ", ".join(known), ", ".join(unknown), ", ".join(dense)


def _opened(entry: Configuration) -> BlockModel:
    if entry.saved is None:
        return open_in_memory(entry.model())
    with tempfile.TemporaryDirectory() as folder:
        return open_model(resolve(str(entry.save(Path(folder)))))
