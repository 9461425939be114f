"""Data sets of the Hugging Face hub, or of the cache of `datasets` where the hub is out of reach."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from stages.errors import ResourceError, UsageError
from stages.machine.hub import reason_of

log = logging.getLogger(__name__)
T = TypeVar("T")


def require_reachable(repo: str) -> None:
    """Ask the hub for a data set. `datasets` itself tries for half a minute before it gives up.

    Raises:
        UsageError: The hub has no such data set.
        UNREACHABLE: The hub does not answer (`stages.machine.hub`).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(repo, timeout=20)
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"the Hugging Face hub has no data set {repo}, or shows it only to users who are logged in (hf auth login)"
        ) from error


def read_through_hub(repo: str, name: str, load: Callable[[], T], cached: Callable[[], T | None], local: str) -> T:
    """What `load` gives, or if the hub is out of reach `cached`.

    Args:
        repo: The data set.
        name: What messages call the data source.
        load: Reads it.
        cached: Reads it from the cache; None: it is not there.
        local: The local alternatives, for the message.

    Raises:
        UsageError: The hub has no such data set.
        ResourceError: The hub is out of reach and the cache does not have it.
    """
    from stages.machine.hub import UNREACHABLE

    try:
        require_reachable(repo)
        return load()
    except UNREACHABLE as error:
        found = cached()
        if found is None:
            raise unreachable(name, error, local) from error
        log.warning("the Hugging Face hub cannot be reached; using the copy of %s in the cache", name)
        return found


def from_cache(load: Callable[[], T]) -> T | None:
    """What `load` gives without the hub; None if it is not in the cache of `datasets`."""
    import datasets

    from stages.machine.hub import UNREACHABLE

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return load()
    except UNREACHABLE:
        return None
    except ValueError:  # raised by `datasets` for a configuration that is not in its cache
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def unreachable(name: str, error: BaseException, local: str) -> ResourceError:
    """The error for a data source that only the hub has. local: what to use instead."""
    return ResourceError(
        f"{name} comes from the Hugging Face hub, which is out of reach ({reason_of(error)}): try later, or use "
        f"pydocs, which comes with Python, or {local}"
    )
