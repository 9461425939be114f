"""Where lampctl keeps what it can fetch or make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where fetched and converted models are kept: $LAMPCTL_CACHE, or lampctl/ in the user's cache folder."""
    own = os.environ.get("LAMPCTL_CACHE")
    if own:
        return Path(own).expanduser()
    return machine_cache_dir()


def machine_cache_dir() -> Path:
    """Where what was found out about this machine is kept: lampctl/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lampctl"
