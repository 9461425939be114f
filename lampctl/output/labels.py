"""What things are called in front of people: methods, texts, layers."""

from __future__ import annotations

from pathlib import Path


def source_label(source: str) -> str:
    """A data source with its file or folder, if it has one, by its name alone."""
    kind, colon, path = source.partition(":")
    if not colon:
        return source
    return Path(path).name if kind == "text" else f"{kind}:{Path(path).name}"


def layer_label(name: str, block: int) -> str:
    """The layer's name without what all layers of a block share: "q_proj", or "attn.c_proj" where that is not one."""
    inside = name.partition(f".{block}.")[2] or name
    return inside.rpartition(".")[2] if "c_proj" not in inside and "dense" not in inside else inside
