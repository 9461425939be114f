"""Conformance kit for storages of run directories.

A test of a storage makes an empty one for each check and runs it::

    @pytest.mark.parametrize("check", CHECKS)
    def test_my_storage(check, tmp_path):
        check(MyStorage(tmp_path), lambda: MyStorage(tmp_path))

Each check gets a prepared, empty storage and a function that opens the same place as another process would. It raises
AssertionError with what is wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import FileExists, FileGone
from pipeline.rundir.records import PayloadFile
from pipeline.rundir.storage.base import Storage

Again = Callable[[], Storage]
_ATTEMPT = "data/000000-aa"


def check_one_process_creates_a_record(storage: Storage, again: Again) -> None:
    """A record is made by exactly one process, whole, and every process reads the winner's bytes."""
    key = "commits/000000.json"
    storage.create(key, b"first")
    _refuses(FileExists, lambda: storage.create(key, b"second"), "a record was made twice")
    other = again()
    _refuses(FileExists, lambda: other.create(key, b"second"), "another process made the record again")
    for place in (storage, other):
        assert place.read(key) == b"first", "the record was replaced"
    assert other.names("commits") == ["000000.json"], "the record is not listed"
    _refuses(FileGone, lambda: other.read("commits/000001.json"), "a record that does not exist was read")


def check_what_is_kept_is_seen_by_another_process(storage: Storage, again: Again) -> None:
    """After `keep`, another process finds every file, with its size and digest."""
    contents = b"weights" * 1000
    _write(storage, "pruned-0", "block.safetensors", contents)
    storage.keep(_ATTEMPT)
    other, key = again(), f"{_ATTEMPT}/pruned-0/block.safetensors"
    assert other.sizes(_ATTEMPT) == {key: len(contents)}, "sizes"
    assert other.load(key) == contents, "load"
    assert other.local(key).read_bytes() == contents, "local"
    found = other.digest(key)
    assert (found.size, found.sha256) == (len(contents), hashlib.sha256(contents).hexdigest()), "digest"
    assert other.names("data") == ["000000-aa"], "names"
    assert other.exists(_ATTEMPT), "a folder does not exist"
    assert other.exists(key), "a file does not exist"
    assert not other.exists("data/000000-a"), "a prefix of a name exists"


def check_files_behind_a_folder_are_written(storage: Storage, again: Again) -> None:
    """`written` lists what was written under a key, also when it is bulky."""
    _write(storage, "biased-0", "c.0", b"activations", is_bulky=True)
    assert storage.written(_ATTEMPT) == {f"{_ATTEMPT}/biased-0/c.0"}, "written"
    storage.keep(_ATTEMPT)
    assert storage.load(f"{_ATTEMPT}/biased-0/c.0") == b"activations", "load"


def check_a_folder_is_made_once(storage: Storage, again: Again) -> None:
    """A folder of a payload is new, or it is refused."""
    storage.new_folder(_ATTEMPT, with_parents=True)
    storage.new_folder(f"{_ATTEMPT}/pruned-0")
    _refuses(FileExists, lambda: storage.new_folder(f"{_ATTEMPT}/pruned-0"), "a folder was made twice")


def check_remove_deletes_for_every_process(storage: Storage, again: Again) -> None:
    """What is removed is gone for every process; removing it again is no error."""
    _write(storage, "pruned-0", "w", b"w")
    storage.keep(_ATTEMPT)
    storage.create("progress/000001/000000", b"checkpoint")
    other = again()
    assert other.load(f"{_ATTEMPT}/pruned-0/w") == b"w", "load"
    other.remove("progress/000001/000000")
    other.remove(f"{_ATTEMPT}/pruned-0")
    storage.remove(_ATTEMPT)
    for place in (storage, other):
        assert not place.exists(f"{_ATTEMPT}/pruned-0"), "a removed folder exists"
        assert place.names("progress") == [] or place.names("progress/000001") == [], "a removed file is listed"
        place.remove(_ATTEMPT)
    assert storage.names("data") == [], "a removed folder is listed"


def check_put_back_replaces_a_payload(storage: Storage, again: Again) -> None:
    """A payload that is put back replaces the old one completely."""
    _write(storage, "pruned-0", "w", b"damaged")
    storage.keep(_ATTEMPT)
    storage.new_folder("data/000001-bb", with_parents=True)
    (storage.new_folder("data/000001-bb/pruned-0") / "v").write_bytes(b"sound")
    storage.put_back("data/000001-bb/pruned-0", f"{_ATTEMPT}/pruned-0")
    for place in (storage, again()):
        assert place.sizes(_ATTEMPT) == {f"{_ATTEMPT}/pruned-0/v": 5}, "the old files are still there"
        assert place.load(f"{_ATTEMPT}/pruned-0/v") == b"sound", "the new file is not there"


def check_a_view_appears_as_a_whole(storage: Storage, again: Again) -> None:
    """A view shows exactly the files asked for, for every process, and is replaced as a whole."""
    contents = {"config.json": b"{}", "model.safetensors": b"w" * 100, "masks/0": b"m"}
    storage.new_folder(_ATTEMPT, with_parents=True)
    folder = storage.new_folder(f"{_ATTEMPT}/model")
    for name, data in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    storage.keep(_ATTEMPT)
    sources = {name: _file(f"{_ATTEMPT}/model/{name}", data) for name, data in contents.items()}
    assert not storage.is_published("model", sources), "a view exists before it is published"
    shown = storage.publish("model", sources)
    assert {name: (shown / name).read_bytes() for name in contents} == contents, "the view shows other bytes"
    other = again()
    assert other.is_published("model", sources), "another process does not see the view"
    assert other.sizes("model") == {f"model/{name}": len(data) for name, data in contents.items()}, "sizes of a view"
    fewer = {name: sources[name] for name in ("config.json", "model.safetensors")}
    other.remove("model/config.json")
    assert not other.is_published("model", fewer), "a view counts as whole without one of its files"
    shown = other.publish("model", fewer)
    found = sorted(path.name for path in Path(shown).rglob("*") if path.is_file())
    assert found == ["config.json", "model.safetensors"], "a replaced view has files of the old one"


def check_lines_are_appended(storage: Storage, again: Again) -> None:
    """Lines of two processes stand in one file, in order."""
    storage.append("events.jsonl", "one")
    storage.append("events.jsonl", "two")
    again().append("events.jsonl", "three")
    assert storage.read("events.jsonl") == b"one\ntwo\nthree\n", "lines"


def check_a_damaged_record_keeps_its_bytes_until_its_number_is_settled(storage: Storage, again: Again) -> None:
    """A damaged record loses its name, not its bytes; `tidy` deletes it once a sound one has the number."""
    storage.create("commits/000000.json", b"torn")
    storage.set_record_aside("commits/000000.json")
    assert not storage.exists("commits/000000.json"), "the damaged record has its name"
    assert len(storage.names("commits")) == 1, "the damaged record was destroyed"
    storage.tidy(["commits/000001.json"], [])
    assert len(storage.names("commits")) == 1, "tidy deleted the record of a number that is not settled"
    storage.tidy(["commits/000000.json"], [])
    assert storage.names("commits") == [], "tidy kept the record of a settled number"


def check_its_disks(storage: Storage, again: Again) -> None:
    """The disks that a run fills: weights first, activations on exactly one."""
    assert storage.disks, "it names no disk"
    assert storage.disks[0].holds_weights, "the first disk holds no weights"
    assert sum(disk.holds_activations for disk in storage.disks) == 1, "activations are on one disk"
    assert storage.label, "it has no label"


CHECKS: tuple[Callable[[Storage, Again], None], ...] = (
    check_one_process_creates_a_record,
    check_what_is_kept_is_seen_by_another_process,
    check_files_behind_a_folder_are_written,
    check_a_folder_is_made_once,
    check_remove_deletes_for_every_process,
    check_put_back_replaces_a_payload,
    check_a_view_appears_as_a_whole,
    check_lines_are_appended,
    check_a_damaged_record_keeps_its_bytes_until_its_number_is_settled,
    check_its_disks,
)


def _write(storage: Storage, payload: str, name: str, data: bytes, *, is_bulky: bool = False) -> None:
    storage.new_folder(_ATTEMPT, with_parents=True)
    (storage.new_folder(f"{_ATTEMPT}/{payload}", is_bulky=is_bulky) / name).write_bytes(data)


def _file(key: str, data: bytes) -> PayloadFile:
    return PayloadFile(path=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _refuses(error: type[Exception], act: Callable[[], object], what: str) -> None:
    try:
        act()
    except error:
        return
    raise AssertionError(f"{what}: expected {error.__name__}")
