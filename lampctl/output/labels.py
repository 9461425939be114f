"""Short names of steps, data sources and layers for tables."""

from __future__ import annotations

import re
from pathlib import Path

from stages.data.registry import source_kind


def source_label(source: str) -> str:
    """Name of a data source without the path of its file or folder."""
    kind, colon, path = source.partition(":")
    if not colon:
        return source
    return Path(path).name if kind == "text" else f"{kind}:{Path(path).name}"


def layer_label(name: str, block: int) -> str:
    """Name of a layer inside its block: "q_proj", or "attn.c_proj" where the last part is not unique."""
    inside = name.partition(f".{block}.")[2] or name
    return inside.rpartition(".")[2] if "c_proj" not in inside and "dense" not in inside else inside


def measured_label(source: str, protocol: str) -> str:
    """A data source with the protocol that it was measured by: ``wikitext2 @2048``."""
    return f"{source_label(source)} @{protocol}" if protocol else source_label(source)


def step_label(name: str) -> str:
    """Name of a step for people.

    Local files stand by their names: their whole paths do not fit a line. Tokens of a window stand only where windows
    are of text: an encoder of images takes as many for each image.
    """
    short = re.sub(r"([:@])/.*/", r"\1", name)
    measured = re.fullmatch(r"(evaluate/\w+/)(.+)@\d+(?::(\d+))?((?::[^:@]+)?)", short)
    if measured is None:
        return short
    which, source, limit, metric = measured.groups()
    kind = source_kind(source)
    if kind is None or kind.contents == "text":
        return short
    return which + source + (f" (first {limit})" if limit else "") + metric
