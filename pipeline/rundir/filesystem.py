"""The one writer: everything that a run puts on a disk passes through here.

Every operation that changes a disk is a method of `Calls`, and there is one `calls` for the process. A test,
or a simulated disk, puts its own in that place and so sees, counts, delays or fails each of them.
What is written is durable only after `write_new`, `replace_file` or `flush_tree`. New files and folders get
the permissions that the umask asks for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import DiskError, FileExists, FileGone, OutOfDisk
from stages.formats.file_digest import FileDigest, digest_file

Bytes = bytes | bytearray | memoryview

# Names that this module gives to what is not finished, or on its way out. A crash may leave one behind.
LEFTOVER = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{8}\.(tmp|old)$")

_COPY_BYTES = 1 << 22
_PIECE_BYTES = 1 << 20  # hashed by another thread from this size on
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# A payload may also come from another file system, or have as many names as its file system allows.
_NO_LINK_HERE = _NO_LINKS | {errno.EXDEV, errno.EMLINK}


class Calls:
    """The system calls that change a disk, one method each; they raise OSError as the system does."""

    def create(self, path: Path) -> int:
        """A descriptor of the new file `path`; FileExistsError if the name is taken."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_to_append(self, path: Path) -> int:
        """A descriptor that reads anywhere in `path` and writes at its end."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """How many bytes of `data` were written."""
        return os.write(descriptor, data)

    def flush(self, descriptor: int) -> None:
        """Return once the file (or folder) is on the medium."""
        os.fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give the file a second name; FileExistsError if that is taken."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Move within the file system, replacing a file at `target`."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Take a file's name away."""
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """One new folder, in one that exists."""
        os.mkdir(path)

    def remove_folder(self, path: Path) -> None:
        """Take an empty folder away."""
        os.rmdir(path)


calls = Calls()


class FileWriter:
    """A new file, hashed as the bytes pass. Not durable before `flush`, or a `flush_tree` over its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._size = 0
        with _naming(path, "create"):
            self._descriptor: int | None = calls.create(path)

    def write(self, data: Bytes) -> int:
        """The number of bytes written, which is all of them. Raises OutOfDisk or DiskError."""
        assert self._descriptor is not None, "the file is closed"
        view = memoryview(data).cast("B")
        hashed = _hash_beside(self._hash, view)
        try:
            _write_all(self._descriptor, view, self.path)
        finally:
            hashed()
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Return once all bytes are on the medium (the file's name is not, before its folder is flushed)."""
        assert self._descriptor is not None, "the file is closed"
        with _naming(self.path, "flush"):
            calls.flush(self._descriptor)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with _naming(self.path, "close"):
                os.close(descriptor)

    @property
    def digest(self) -> FileDigest:
        """Size and sha256 of what was written so far."""
        return FileDigest(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_file(path: Path, data: Bytes) -> FileDigest:
    """Size and sha256 of the new file `path` with these bytes; not durable yet."""
    with FileWriter(path) as writer:
        writer.write(data)
    return writer.digest


def write_new(path: Path, data: bytes) -> None:
    """Make the file `path`, whole and durable, in one step that only one process can win.

    Raises FileExists if the name is taken; OutOfDisk or DiskError, and then no file of that name was made.
    The name appears by a hard link to a flushed temporary, so every reader sees the whole file. On a file
    system without hard links it is created exclusively under its final name instead: still only one process
    wins, but a crash in the middle leaves a torn file, which its reader must recognise.
    """
    temporary = _beside(path, "tmp")
    try:
        _write_flushed(temporary, data)
        try:
            with _naming(path, "create"):
                calls.link(temporary, path)
        except FileGone:
            # Our temporary is gone: another process tidied up after it had taken the name.
            if path.exists():
                raise FileExists(f"{path} exists already") from None
            raise
        except DiskError as error:
            if not _is(error, _NO_LINKS):
                raise
            _write_flushed(path, data)
    finally:
        # Nothing that matters is lost if this fails too, and the first error is the one to tell.
        with contextlib.suppress(OSError):
            calls.unlink(temporary)
    flush_folder(path.parent)


def replace_file(path: Path, data: bytes, folder: Path | None = None) -> None:
    """Make or replace the file `path`, durably; a reader sees the old bytes or the new, never a mixture.

    folder: where a crash may leave the temporary, on the same file system; beside `path` by default.
    """
    temporary = _beside((folder or path.parent) / path.name, "tmp")
    _write_flushed(temporary, data)
    rename(temporary, path)
    flush_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to `path`, not durably. A torn last line, left by a crash, is ended first."""
    with _naming(path, "append to"):
        descriptor = calls.open_to_append(path)
    try:
        with _naming(path, "append to"):
            end = os.lseek(descriptor, 0, os.SEEK_END)
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        # One write, so that lines of two processes do not mix.
        _write_all(descriptor, memoryview(("\n" * torn + line + "\n").encode()), path)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """All bytes of a plain file. Raises FileGone if it is not there, DiskError for a symbolic link."""
    with _naming(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            return file.read()


def read_into(path: Path, buffer: memoryview, *, with_digest: bool) -> FileDigest:
    """Read a plain file into `buffer`, and no further: size and sha256 of what it holds ("" unless asked for).

    The size is the file's own; where it is not the buffer's, the rest of the buffer is as it was. Raises FileGone if
    it is not there, DiskError for a symbolic link.
    """
    digest, size = hashlib.sha256(), 0
    with _naming(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        hashed: Callable[[], None] = _nothing
        with open(descriptor, "rb", buffering=0) as file:
            while size < len(buffer) and (read := file.readinto(buffer[size : size + _PIECE_BYTES])):
                hashed()  # of the piece before
                if with_digest:
                    hashed = _hash_beside(digest, buffer[size : size + read])
                size += read
            hashed()
            size = max(size, os.fstat(file.fileno()).st_size)
    return FileDigest(size, digest.hexdigest() if with_digest else "")


def hash_file(path: Path) -> FileDigest:
    """Size and sha256 of a file, read from the disk."""
    with _naming(path, "read"):
        return digest_file(path)


def sizes_under(root: Path, key: str) -> dict[str, int]:
    """The size of every file under the folder `key` of `root`, by its own key; links count as files.

    What another process deletes meanwhile is left out.
    """
    found = {}
    for parent, folders, files in os.walk(root / key):
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(parent, name)))):
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                found[path.relative_to(root).as_posix()] = path.stat(follow_symlinks=False).st_size
    return found


def hash_bytes(data: Bytes) -> FileDigest:
    """Size and sha256 of bytes."""
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def copy_file(source: Path, target: Path) -> FileDigest:
    """Size and sha256 of `target`, a new file with the bytes of `source`."""
    with FileWriter(target) as writer, _naming(source, "read"), open(source, "rb") as file:
        while piece := file.read(_COPY_BYTES):
            writer.write(piece)
    return writer.digest


def link_or_copy(source: Path, target: Path) -> FileDigest | None:
    """Give the file a second name: None. Where the file system cannot: the digest of a copy."""
    try:
        link(source, target)
    except DiskError as error:
        if not _is(error, _NO_LINK_HERE):
            raise
        return copy_file(source, target)
    return None


def link(source: Path, target: Path) -> None:
    """Give the file a second name. Raises FileExists if that is taken, DiskError where there are no links."""
    with _naming(target, f"link {source} to"):
        calls.link(source, target)


def rename(source: Path, target: Path) -> None:
    """Move a file or folder within the file system. Replaces a file at `target`, never a filled folder."""
    with _naming(target, f"rename {source} to"):
        calls.rename(source, target)


def remove_file(path: Path) -> None:
    """Take a file away; missing is fine."""
    with _naming(path, "delete"), contextlib.suppress(FileNotFoundError):
        calls.unlink(path)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each durably entered in its parent; existing is fine."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with _naming(path, "create folder"):
        try:
            calls.make_folder(path)
        except FileExistsError:
            if not path.is_dir():
                raise
    flush_folder(path.parent)


def make_new_folder(path: Path) -> None:
    """Make one folder, not durably. Raises FileExists if the name is taken."""
    with _naming(path, "create folder"):
        calls.make_folder(path)


def remove_tree(folder: Path) -> None:
    """Take a folder away with all that is in it; links in it are not followed; missing is fine."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            remove_file(Path(parent, name))
        for name in folders:
            _remove_folder(Path(parent, name))
    _remove_folder(folder)


def flush_tree(folder: Path) -> None:
    """Return once everything in `folder` is on the medium: the files, then the folders from the bottom up."""

    def fail(error: OSError) -> None:
        raise error

    with _naming(folder, "read folder"):
        for parent, _, files in os.walk(folder, topdown=False, onerror=fail):
            for name in sorted(files):
                _flush(Path(parent, name))
            flush_folder(Path(parent))


def flush_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the medium."""
    try:
        _flush(folder)
    except DiskError as error:
        # Some network file systems have no flush for folders: their names are durable when they are made.
        if not _is(error, {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}):
            raise


def set_aside(path: Path) -> Path:
    """The name beside it to which a file or folder was renamed, in one step, to mark it as rubbish."""
    rubbish = _beside(path, "old")
    rename(path, rubbish)
    return rubbish


def temporary_folder(path: Path) -> Path:
    """A new, empty folder beside `path`, to be filled and renamed to it."""
    temporary = _beside(path, "tmp")
    make_new_folder(temporary)
    return temporary


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _write_flushed(path: Path, data: bytes) -> None:
    """A new file with these bytes, on the medium; if that fails, no file."""
    with FileWriter(path) as writer:
        try:
            writer.write(data)
            writer.flush()
        except DiskError:
            with contextlib.suppress(OSError):
                calls.unlink(path)
            raise


def _hash_beside(digest: Any, data: memoryview) -> Callable[[], None]:
    """Have `data` hashed while the caller reads or writes; what is returned waits for it, and must be called.

    Of small data, hashing is quicker than handing it over.
    """
    if len(data) < _PIECE_BYTES:
        digest.update(data)
        return _nothing
    thread = threading.Thread(target=digest.update, args=(data,), name="hash", daemon=True)
    thread.start()
    return thread.join


def _nothing() -> None:
    """There is nothing to wait for."""


def _write_all(descriptor: int, view: memoryview, path: Path) -> None:
    with _naming(path, "write"):
        while view:
            view = view[calls.write(descriptor, view) :]


def _flush(path: Path) -> None:
    with _naming(path, "flush"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            calls.flush(descriptor)
        finally:
            os.close(descriptor)


def _remove_folder(path: Path) -> None:
    if path.is_symlink():
        remove_file(path)
        return
    with _naming(path, "delete folder"), contextlib.suppress(FileNotFoundError):
        calls.remove_folder(path)


def _is(error: DiskError, numbers: set[int]) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in numbers


@contextlib.contextmanager
def _naming(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into the error of ours that says what was being done to which path, and what helps."""
    try:
        yield
    except FileExistsError as error:
        raise FileExists(f"{path} exists already") from error
    except FileNotFoundError as error:
        raise FileGone(f"cannot {doing} {path}: it, or the folder it belongs in, is not there") from error
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfDisk(
                f"no room left to {doing} {path} ({_free(path)}). What was committed is safe: free some "
                "space, or move the run directory to a larger disk, and run the same command again"
            ) from error
        raise DiskError(f"cannot {doing} {path}: {error.strerror or error}") from error


def _free(path: Path) -> str:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return "the disk is full"
    return f"{free / 1e6:,.0f} MB free on the disk; a quota may be smaller"
