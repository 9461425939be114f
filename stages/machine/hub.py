"""What it looks like when the Hugging Face hub is out of reach."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

# The hub's client is httpx in some versions of huggingface_hub and httpx2 in later ones: its base of all errors is
# found where the hub's own error inherits from it.
_CLIENT_ERRORS = tuple(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")

UNREACHABLE: tuple[type[BaseException], ...] = (
    *_CLIENT_ERRORS,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OSError,
)


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
