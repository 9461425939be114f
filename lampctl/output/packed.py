"""Sizes of a packed file on a terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lampctl.output.console import console_here, shown_path

if TYPE_CHECKING:
    from stages.formats.base import PackedSizes

_LITTLE = 0.95  # share of the folder's weights that a packed file saves little above
_PACKED_PARTS = {
    "dense": "dense: the folder's weights",
    "packed": "packed: all of it",
    "masks": "  masks",
    "codes": "  codes of kept weights",
    "values": "  values of kept weights",
    "scales": "  scales and zero points",
    "untouched": "  weights stored as they are",
    "files": "  tokenizer, configuration, card",
    "described": "  names, shapes, digests",
}


def show_packed(what: str, path: Path, sizes: PackedSizes | None, as_json: bool) -> None:
    """Print the size of each part of a packed file, compared with the model's folder, and the path.

    sizes: of the parts; None where only the size of the whole file is known.
    """
    if sizes is None:
        _show_file(what, path, as_json)
        return
    if as_json:
        print(json.dumps({"path": str(path.absolute()), **sizes.record()}, indent=2))
        return
    table = Table("on disk")
    table.add_column("bytes", justify="right")
    table.add_column("of dense", justify="right")
    for name, label in _PACKED_PARTS.items():
        size_bytes = getattr(sizes, f"{name}_bytes")
        if size_bytes:
            table.add_row(label, f"{size_bytes:,}", f"{100 * size_bytes / sizes.dense_bytes:.1f}%")
    console = console_here()
    console.print(table)
    gain = _gain(sizes)
    if gain:
        console.print(gain, highlight=False, soft_wrap=True)
    console.print(f"The {what} is {shown_path(str(path.absolute()))}", highlight=False, soft_wrap=True)


def _gain(sizes: PackedSizes) -> str:
    """What to say where packing was of little use; empty where it was of some."""
    weights_bytes = sizes.packed_bytes - sizes.files_bytes - sizes.described_bytes
    if weights_bytes < _LITTLE * sizes.dense_bytes:
        return ""
    amount = "nothing" if weights_bytes >= sizes.dense_bytes else "little"
    return (
        f"Packing gained {amount}: tensors that hold all experts of a block, and all that is not pruned, are stored as "
        "they are. The model folder is the better form of this model."
    )


def _show_file(what: str, path: Path, as_json: bool) -> None:
    size_bytes = path.stat().st_size
    if as_json:
        print(json.dumps({"path": str(path.absolute()), "size_bytes": size_bytes}, indent=2))
        return
    line = f"The {what} is {shown_path(str(path.absolute()))}, {size_bytes:,} bytes"
    console_here().print(line, highlight=False, soft_wrap=True)
