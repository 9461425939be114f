"""Durations and sizes as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """For example ``41.2 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def time_left(seconds: float | None, until: str | None) -> str:
    """ "about 9 min left", or only until a long step whose time is not known: "about 9 min until distill"."""
    if seconds is None:
        return ""
    return f"about {duration(seconds)} left" if until is None else f"about {duration(seconds)} until {until}"


def size(num_bytes: float) -> str:
    """For example ``812 MB``, ``7.81 GB`` (powers of ten)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
