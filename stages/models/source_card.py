"""The model card of the source: kept beside the exported model's own, which takes over what still holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_KEPT = re.compile(r"ORIGINAL_README(?:_(\d+))?\.md")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# Entries that hold for the pruned model, too. Others, as the results of evaluations, are of the source alone.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "base_model", "tags")


def is_card(name: str) -> bool:
    """Whether a file of a model folder is its card. name: relative to the folder."""
    return name.lower() == "readme.md"


def kept_name(names: Iterable[str]) -> str:
    """What the source's card is called in the exported folder.

    ORIGINAL_README.md. A source that lampctl made holds a file of this name already, of its own source: the number goes
    up.

    Args:
        names: All files of the source.
    """
    kept = _kept(names)
    return f"ORIGINAL_README_{max(kept) + 1}.md" if kept else "ORIGINAL_README.md"


@dataclass(frozen=True)
class SourceCard:
    """The source's card in the exported folder."""

    name: str  # of its file
    entries: Mapping[str, Any]  # of its front matter that hold for the exported model: strings, and lists of strings


def source_card(folder: Path) -> SourceCard | None:
    """The card of the model that an exported one was made from; None where it had none.

    Front matter that is no YAML mapping is reported, and has no entries.
    """
    kept = _kept(path.name for path in folder.iterdir())
    if not kept:
        return None
    card = folder / kept[max(kept)]
    found = _FRONT_MATTER.search(card.read_text(encoding="utf-8", errors="replace"))
    entries = _entries(found[1], card) if found is not None else {}
    return SourceCard(card.name, {key: entries[key] for key in _INHERITED if entries.get(key)})


def _entries(front_matter: str, card: Path) -> Mapping[str, Any]:
    import yaml

    try:
        # Everything stays text: YAML would read the language "no" as false.
        entries = yaml.load(front_matter, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        entries, reason = None, " ".join(str(error).split())
    else:
        reason = "it is no mapping"
    if not isinstance(entries, dict):
        log.warning("%s: its front matter is no YAML (%s): licence and language are not in the new card", card, reason)
        return {}
    return entries


def _kept(names: Iterable[str]) -> dict[int, str]:
    """Which of the files are cards of sources, by number."""
    return {int(match[1] or 1): name for name in names if (match := _KEPT.fullmatch(name))}
