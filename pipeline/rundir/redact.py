"""Redact secrets in text before it is written or shown: tokens, keys, passwords in addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|APIKEY|API_KEY|ACCESS_KEY|ACCOUNT_KEY|SAS", re.I)
# Shorter values are words that stand in any text.
_SHORTEST = 8
_USER_IN_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
_IN_QUERY = re.compile(r"(?i)\b(x-amz-(?:signature|credential|security-token)|signature|sig|token|key)=[^&\s\"']+")
_KNOWN_KINDS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")
_GONE = "***"


def scrub(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text without the values of variables that hold secrets, and without what looks like one."""
    for name, value in environ.items():
        # A path to a file of credentials is no secret, and is worth seeing.
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST and not os.path.exists(value):
            text = text.replace(value, _GONE)
    text = _USER_IN_ADDRESS.sub(rf"\g<scheme>{_GONE}@", text)
    text = _IN_QUERY.sub(rf"\1={_GONE}", text)
    return _KNOWN_KINDS.sub(_GONE, text)


def scrub_values(value: Any) -> Any:
    """A JSON value with every string in it scrubbed."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {key: scrub_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_values(inner) for inner in value]
    return value
