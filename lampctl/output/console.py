"""The console that tables are printed on, and paths as it shows them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.rundir.storage.locate import is_address


def console_here() -> Console:
    """Console on stdout: as wide as the terminal, or 160 columns in a file or pipe."""
    console = Console(markup=False)  # paths may hold brackets
    return console if console.is_terminal else Console(width=160, markup=False)


def shown_path(place: str) -> str:
    """A path relative to the working directory if it is inside it; addresses unchanged."""
    here = Path.cwd()
    if is_address(place) or not Path(place).is_relative_to(here):
        return place
    return str(Path(place).relative_to(here))
