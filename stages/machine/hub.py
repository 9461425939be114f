"""Errors that the Hugging Face hub raises when it cannot be reached."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

# The hub's client is httpx in some versions of huggingface_hub and httpx2 in later ones. The base class of its errors
# is a parent class of the hub's own error.
_CLIENT_ERRORS = tuple(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")

UNREACHABLE: tuple[type[BaseException], ...] = (
    *_CLIENT_ERRORS,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OSError,
)


def reason_of(error: BaseException) -> str:
    """First line of an error's message, or the name of its class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
