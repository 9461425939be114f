"""The one writer: create-only, durable, and clear about what went wrong."""

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from pipeline.errors import DiskError, FileExists, FileGone, OutOfDisk
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import Calls, FileDigest, FileWriter


class FailingCalls(Calls):
    """A disk on which one kind of call fails."""

    def __init__(self, call: str, number: int) -> None:
        def fail(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        setattr(self, call, fail)


class RecordingCalls(Calls):
    """A disk that notes what it is told, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def flush(self, descriptor: int) -> None:
        self.log.append("flush " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        super().flush(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self.log.append(f"link {target.name}")
        super().link(source, target)


def test_write_new_makes_the_file_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    filesystem.write_new(tmp_path / "a.json", b"first")
    assert (tmp_path / "a.json").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_new_never_replaces(tmp_path: Path) -> None:
    filesystem.write_new(tmp_path / "a.json", b"first")
    with pytest.raises(FileExists, match=r"a\.json"):
        filesystem.write_new(tmp_path / "a.json", b"second")
    assert (tmp_path / "a.json").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_new_has_one_winner_among_many(tmp_path: Path) -> None:
    won = []

    def write(number: int) -> None:
        try:
            filesystem.write_new(tmp_path / "a", b"%d" % number * 1000)
        except FileExists:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "a").read_bytes() == b"%d" % won[0] * 1000


def test_write_new_flushes_the_bytes_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = RecordingCalls()
    monkeypatch.setattr(filesystem, "calls", calls)
    filesystem.write_new(tmp_path / "a", b"x")
    assert calls.log[0].startswith("flush .a.")
    assert calls.log[1:] == ["link a", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_write_new_is_create_only_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(filesystem, "calls", FailingCalls("link", number))
    filesystem.write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExists):
        filesystem.write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_write_new_knows_it_lost_when_its_temporary_was_tidied_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tidied(Calls):
        def link(self, source: Path, target: Path) -> None:
            target.write_bytes(b"the winner's")
            source.unlink()
            super().link(source, target)

    monkeypatch.setattr(filesystem, "calls", Tidied())
    with pytest.raises(FileExists):
        filesystem.write_new(tmp_path / "a", b"ours")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["create", "write", "flush", "link"])
def test_a_full_disk_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    monkeypatch.setattr(filesystem, "calls", FailingCalls(call, number))
    with pytest.raises(OutOfDisk, match=r"a\.json.*What was committed is safe: free some space"):
        filesystem.write_new(tmp_path / "a.json", b"x")
    assert os.listdir(tmp_path) == []


def test_other_errors_name_the_path_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "calls", FailingCalls("write", errno.EIO))
    with pytest.raises(DiskError, match=rf"cannot write {tmp_path}/a: Input/output error") as caught:
        filesystem.write_file(tmp_path / "a", b"x")
    assert not isinstance(caught.value, OutOfDisk)
    with pytest.raises(FileGone, match="missing"):
        filesystem.read_file(tmp_path / "missing")


def test_a_writer_hashes_what_passes_even_when_the_system_writes_in_small_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(Calls):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[:7])

    monkeypatch.setattr(filesystem, "calls", Small())
    with FileWriter(tmp_path / "a") as writer:
        writer.write(b"hello " * 10)
        writer.write(memoryview(b"world"))
    expected = b"hello " * 10 + b"world"
    assert (tmp_path / "a").read_bytes() == expected
    assert writer.digest == FileDigest(len(expected), hashlib.sha256(expected).hexdigest())
    assert filesystem.hash_file(tmp_path / "a") == writer.digest
    assert filesystem.copy_file(tmp_path / "a", tmp_path / "b") == writer.digest


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        filesystem.make_folder(tmp_path / "folder" / "inner")
        filesystem.write_new(tmp_path / "new", b"x")
        filesystem.replace_file(tmp_path / "replaced", b"x")
        filesystem.write_file(tmp_path / "written", b"x")
        filesystem.append_line(tmp_path / "log", "x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes.pop("folder") == 0o750
    assert set(modes.values()) == {0o640}


def test_replace_file_replaces_the_name_and_not_what_other_names_see(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "other")
    filesystem.replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"old"


def test_append_line_ends_a_torn_line_first(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("whole\ntor")
    filesystem.append_line(tmp_path / "log", "next")
    filesystem.append_line(tmp_path / "log", "last")
    assert (tmp_path / "log").read_text() == "whole\ntor\nnext\nlast\n"


def test_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert filesystem.link_or_copy(tmp_path / "a", tmp_path / "linked") is None
    assert (tmp_path / "a").samefile(tmp_path / "linked")
    monkeypatch.setattr(filesystem, "calls", FailingCalls("link", errno.EXDEV))
    assert filesystem.link_or_copy(tmp_path / "a", tmp_path / "copied") == filesystem.hash_file(tmp_path / "a")
    assert not (tmp_path / "a").samefile(tmp_path / "copied")
    monkeypatch.setattr(filesystem, "calls", FailingCalls("link", errno.EIO))
    with pytest.raises(DiskError, match="Input/output"):
        filesystem.link_or_copy(tmp_path / "a", tmp_path / "failed")


def test_flush_tree_goes_bottom_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "deep").write_bytes(b"x")
    (tmp_path / "outer" / "shallow").write_bytes(b"x")
    calls = RecordingCalls()
    monkeypatch.setattr(filesystem, "calls", calls)
    filesystem.flush_tree(tmp_path / "outer")
    assert calls.log == ["flush deep", "flush inner", "flush shallow", "flush outer"]
    with pytest.raises(FileGone):
        filesystem.flush_tree(tmp_path / "missing")


def test_a_file_system_that_cannot_flush_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoFolderFlush(Calls):
        def flush(self, descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(filesystem, "calls", NoFolderFlush())
    filesystem.write_new(tmp_path / "a", b"x")
    monkeypatch.setattr(filesystem, "calls", FailingCalls("flush", errno.EINVAL))
    with pytest.raises(DiskError):
        filesystem.write_new(tmp_path / "b", b"x")


def test_remove_tree_does_not_follow_links_and_may_run_twice(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"x")
    (tmp_path / "gone" / "inner").mkdir(parents=True)
    (tmp_path / "gone" / "inner" / "file").write_bytes(b"x")
    (tmp_path / "gone" / "to-folder").symlink_to(tmp_path / "kept")
    (tmp_path / "gone" / "to-file").symlink_to(tmp_path / "kept" / "file")
    filesystem.remove_tree(tmp_path / "gone")
    filesystem.remove_tree(tmp_path / "gone")
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").read_bytes() == b"x"


def test_read_file_refuses_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(DiskError, match="link"):
        filesystem.read_file(tmp_path / "link")
