"""Parse durations and sizes as people write them."""

from __future__ import annotations

import re

from pipeline.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds: "3h30m", "45m", "90s", "1d", or a plain number of seconds. Raises ConfigError."""
    plain = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", plain):
        seconds = float(plain)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms]\s*)+", plain):
        seconds = sum(float(number) * _SECONDS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", plain))
    else:
        raise ConfigError(f"--max-runtime {text}: expected a time such as 3h30m, 45m, 90s or 1d")
    if seconds <= 0:
        raise ConfigError(f"--max-runtime {text}: it must be more than zero")
    return seconds


def parse_size(text: str) -> int:
    """Bytes: "8GB", "7.5GiB", "800MB", or a plain number of bytes.

    Raises:
        ValueError: The text is not a size.
    """
    from pydantic import ByteSize, TypeAdapter

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError("expected a size such as 8GB, 7.5GiB or 800MB")
    return size
