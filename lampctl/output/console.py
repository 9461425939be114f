"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console


def console_here() -> Console:
    """Console on stdout: as wide as the terminal, or 160 columns in a file or pipe."""
    console = Console(markup=False)  # paths may hold brackets
    return console if console.is_terminal else Console(width=160, markup=False)
