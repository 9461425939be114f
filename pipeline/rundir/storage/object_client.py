"""An object store with the errors of ours: S3, Google Cloud Storage, Azure, through obstore.

Credentials, region and endpoint come from the usual environment variables (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_
CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and their kin) or from the machine's own role. obstore repeats what the network
or a busy server spoilt, with growing pauses; what still fails is an error that names the address.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pipeline.errors import BucketError, BucketRefused, FileExists, FileGone, UnsupportedPlace

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Enough to fill a line of 10 Gbit/s, and little enough for a bucket that limits requests.
_NUM_AT_ONCE = 8
_NUM_TRIES = 5
_PAUSE_S = 0.2
_RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(minutes=3)}
_CLIENT: Any = {"timeout": timedelta(minutes=2), "connect_timeout": timedelta(seconds=15)}


P = ParamSpec("P")
T = TypeVar("T")


def _repeating(do: Callable[P, T]) -> Callable[P, T]:
    """Try a request that may be made twice again, where obstore has given up: it repeats no answer that broke off."""

    @functools.wraps(do)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(_NUM_TRIES - 1):
            try:
                return do(*args, **kwargs)
            except BucketRefused:
                raise
            except BucketError:
                time.sleep(_PAUSE_S * 2**attempt)
        return do(*args, **kwargs)

    return repeated


class Objects:
    """The objects under one address. Keys are relative to it."""

    def __init__(self, address: str, store: ObjectStore | None = None) -> None:
        """store: another one than the address says, for tests."""
        self.address = address.rstrip("/")
        self._store: Any = store if store is not None else _open(self.address)

    @_repeating
    def read(self, key: str) -> bytes:
        """An object's bytes. Raises FileGone."""
        import obstore

        with self._naming(key, "read"):
            return bytes(obstore.get(self._store, key).bytes())

    @_repeating
    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object."""
        import obstore

        with self._naming(key, "write"):
            obstore.put(self._store, key, data)

    def create(self, key: str, data: bytes) -> None:
        """Make an object in one request that only one process can win. Raises FileExists.

        The answer may be lost after the object was made: a process that then finds its own bytes has won.
        """
        import obstore

        for attempt in range(_NUM_TRIES):
            try:
                with self._naming(key, "create"):
                    # In one part: only then is it a single request.
                    obstore.put(self._store, key, data, mode="create", use_multipart=False)
                return
            except BucketRefused:
                raise
            except (FileExists, BucketError) as error:
                with contextlib.suppress(FileGone):
                    if self.read(key) == data:
                        return
                    raise FileExists(f"{self.address}/{key} exists already") from error
                if attempt == _NUM_TRIES - 1:
                    raise

    def upload(self, files: Iterable[tuple[str, Path]]) -> None:
        """Make or replace objects with the contents of files, several at once."""
        self._each(self._upload_one, files)

    @_repeating
    def _upload_one(self, item: tuple[str, Path]) -> None:
        import obstore

        key, path = item
        with self._naming(key, "write"):
            obstore.put(self._store, key, path)

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Copy objects within the store, (source, target), several at once, without their passing through here."""
        self._each(self._copy_one, pairs)

    @_repeating
    def _copy_one(self, pair: tuple[str, str]) -> None:
        import obstore

        with self._naming(pair[0], "copy"):
            obstore.copy(self._store, *pair)

    @_repeating
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing is fine."""
        import obstore

        listed = list(keys)
        if listed:
            with self._naming(listed[0], "delete"), contextlib.suppress(FileGone):
                obstore.delete(self._store, listed)

    @_repeating
    def sizes(self, folder: str) -> dict[str, int]:
        """The size of every object under a folder, by its key."""
        import obstore

        with self._naming(folder, "list"):
            # As the service lists them: "data/1" is no prefix of "data/10/x", since a folder ends with a slash.
            return {
                meta["path"]: meta["size"] for chunk in obstore.list(self._store, _prefix(folder)) for meta in chunk
            }

    @_repeating
    def names(self, folder: str) -> list[str]:
        """Names directly in a folder, of objects and folders, sorted."""
        import obstore

        with self._naming(folder, "list"):
            found = obstore.list_with_delimiter(self._store, _prefix(folder))
        keys = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted(key.rstrip("/").rpartition("/")[2] for key in keys)

    def exists(self, key: str) -> bool:
        """Whether there is an object of this name, or a folder with one in it."""
        try:
            self._head(key)
            return True
        except FileGone:
            return bool(self.names(key))

    @_repeating
    def _head(self, key: str) -> None:
        import obstore

        with self._naming(key, "look for"):
            obstore.head(self._store, key)

    @staticmethod
    def _each(do: Any, items: Iterable[Any]) -> None:
        with ThreadPoolExecutor(_NUM_AT_ONCE, thread_name_prefix="bucket") as pool:
            for _ in pool.map(do, items):
                pass  # the first error comes out here

    @contextlib.contextmanager
    def _naming(self, key: str, doing: str) -> Iterator[None]:
        """Turn what obstore raises into the error of ours that says what was being done to which object."""
        from obstore import exceptions

        shown = f"{self.address}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            _require_bucket(error, f"cannot {doing} {shown}")
            raise FileGone(f"cannot {doing} {shown}: it is not there") from error
        except exceptions.AlreadyExistsError as error:
            raise FileExists(f"{shown} exists already") from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise BucketRefused(
                f"cannot {doing} {shown}: the credentials in the environment are not allowed to ({_reason(error)})"
            ) from error
        except exceptions.BaseError as error:
            _require_bucket(error, f"cannot {doing} {shown}")
            raise BucketError(
                f"cannot {doing} {shown}: {_reason(error)}. The run is safe: check the network, and in the environment "
                "the endpoint, the region and the credentials; then try again"
            ) from error


def _require_bucket(error: Exception, what: str) -> None:
    if "NoSuchBucket" in str(error):
        raise BucketRefused(f"{what}: there is no such bucket") from error


def _open(address: str) -> ObjectStore:
    try:
        from obstore import exceptions
        from obstore.store import from_url
    except ImportError:
        raise UnsupportedPlace(f"{address}: run directories in a bucket need obstore: pip install obstore") from None
    try:
        # Options that are given replace those of the environment, all of them.
        allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        return from_url(address, retry_config=_RETRIES, client_options={**_CLIENT, "allow_http": allow_http})
    except (exceptions.BaseError, ValueError) as error:
        raise UnsupportedPlace(f"{address}: {_reason(error)}") from error


def _prefix(folder: str) -> str | None:
    return f"{folder}/" if folder else None


def _reason(error: BaseException) -> str:
    """The first line of an error. The rest is for developers of obstore, and may hold what was sent."""
    text = str(error).split("\n", 1)[0].strip()
    return re.sub(r"(?i)(signature|credential|token|key)=[^&\s]+", r"\1=...", text)[:300] or type(error).__name__
