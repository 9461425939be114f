"""Cache folders: everything in them can be fetched or computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of fetched and converted models: $LAMPCTL_CACHE, or lampctl/ in the user's cache folder."""
    own = os.environ.get("LAMPCTL_CACHE")
    if own:
        return Path(own).expanduser()
    return machine_cache_dir()


def machine_cache_dir() -> Path:
    """Folder of measurements of this machine: lampctl/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lampctl"
