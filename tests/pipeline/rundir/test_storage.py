"""One behaviour, two places: a folder on a disk and a bucket."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, FileExists, FileGone, UnsupportedPlace
from pipeline.rundir.storage.bucket import BucketStorage
from pipeline.rundir.storage.local import FolderStorage
from pipeline.rundir.storage.locate import beside, is_address, locate, scratch_folder
from pipeline.rundir.storage.object_client import Objects
from pipeline.rundir.storage.registry import STORAGES
from pipeline.testing.storages import CHECKS


@pytest.fixture(params=["folder", "folder+scratch", "bucket", "bucket+scratch"])
def storage(request, tmp_path):
    kind, _, scratch = request.param.partition("+")
    if kind == "folder":
        made = FolderStorage(tmp_path / "run")
        made.prepare()
    else:
        from obstore.store import MemoryStore

        made = BucketStorage(Objects("s3://bucket/run", MemoryStore()), tmp_path / "work")
    if scratch:
        made.use_scratch(tmp_path / "scratch" / "run")
    return made


def fresh(storage, tmp_path):
    """The same place, seen from another machine (a bucket) or another process (a folder)."""
    if isinstance(storage, FolderStorage):
        return FolderStorage(storage.folder, storage.scratch)
    return BucketStorage(storage.objects, tmp_path / "another machine")


def write(storage, key, name, data, **how):
    folder = storage.new_folder(key, **how)
    (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check, storage, tmp_path):
    check(storage, lambda: fresh(storage, tmp_path))


@pytest.mark.parametrize("name", ["local", "s3", "gs", "az"])
def test_every_storage_says_what_it_is(name):
    assert STORAGES.get(name).title
    assert STORAGES.get(name).help


def test_activations_on_scratch_are_not_kept_elsewhere(storage, tmp_path):
    storage.new_folder("data/000000-aa", with_parents=True)
    write(storage, "data/000000-aa/biased-0", "c.0", b"activations", is_bulky=True)
    assert storage.written("data/000000-aa") == {"data/000000-aa/biased-0/c.0"}
    storage.keep("data/000000-aa")
    assert storage.load("data/000000-aa/biased-0/c.0") == b"activations"
    if storage.scratch is None:
        assert fresh(storage, tmp_path).load("data/000000-aa/biased-0/c.0") == b"activations"
        return
    assert (storage.scratch / "data/000000-aa/biased-0/c.0").exists()
    storage.use_scratch(tmp_path / "an empty disk")
    assert not storage.exists("data/000000-aa/biased-0")
    assert storage.sizes("data/000000-aa/biased-0") == {}


def test_a_folder_of_a_payload_needs_its_attempt(storage):
    if isinstance(storage, FolderStorage) and storage.scratch is not None:
        pytest.skip("the scratch disk has no folder of the attempt yet")
    with pytest.raises(FileGone):
        storage.new_folder("data/000000-aa/pruned-0")
    storage.new_folder("data/000000-aa", with_parents=True)
    storage.new_folder("data/000000-aa/pruned-0")
    with pytest.raises(FileExists):
        storage.new_folder("data/000000-aa/pruned-0")


def test_remove_takes_it_everywhere(storage, tmp_path):
    storage.new_folder("data/000000-aa", with_parents=True)
    write(storage, "data/000000-aa/pruned-0", "w", b"w")
    write(storage, "data/000000-aa/biased-0", "c.0", b"a", is_bulky=True)
    storage.keep("data/000000-aa")
    storage.create("progress/000001/000000", b"far")
    other = fresh(storage, tmp_path)
    assert other.load("data/000000-aa/pruned-0/w") == b"w"
    other.remove("progress/000001/000000")
    other.remove("data/000000-aa/pruned-0")
    storage.remove("data/000000-aa")
    for place in (storage, other):
        assert not place.exists("data/000000-aa/pruned-0")
        assert place.names("progress") == [] or place.names("progress/000001") == []
        place.remove("data/000000-aa")
    assert storage.names("data") == []


def test_the_disks_that_a_run_needs_room_on(storage):
    assert storage.disks[0].holds_weights
    assert sum(disk.holds_activations for disk in storage.disks) == 1
    assert len(storage.disks) == 1 + (storage.scratch is not None)


def test_a_damaged_local_copy_is_fetched_again(tmp_path):
    from obstore.store import MemoryStore

    storage = BucketStorage(Objects("s3://bucket/run", MemoryStore()), tmp_path / "work")
    storage.objects.write("data/x/w", b"sound")
    storage.local("data/x/w").write_bytes(b"rotten")
    assert storage.load("data/x/w") == b"rotten"
    assert storage.drop_copy("data/x/w")
    assert storage.load("data/x/w") == b"sound"
    storage.drop_copies()
    assert not storage.folder.exists()


def test_what_is_an_address():
    assert is_address("s3://bucket/run")
    assert not is_address("runs/s3")
    assert not is_address("/tmp/run")
    for other in ("http://x/y", "ftp://x", "file:///tmp/x"):
        with pytest.raises(UnsupportedPlace, match=r"s3://\.\.\., gs://\.\.\., az://"):
            is_address(other)


def test_every_kind_of_bucket_opens_with_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    kinds = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
    for scheme, kind in kinds.items():
        storage = locate(f"{scheme}://bucket/some/prefix/")
        assert storage.label == f"{scheme}://bucket/some/prefix"
        assert type(storage.objects._store).__name__ == kind
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(ConfigError, match="Account must be specified"):
        locate("az://bucket/prefix")


def test_without_obstore_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(UnsupportedPlace, match=r"pip install obstore"):
        locate("s3://bucket/prefix")


def test_names_beside_and_on_scratch(tmp_path):
    assert beside("s3://bucket/run/", "sparsegpt") == "s3://bucket/run-sparsegpt"
    assert beside("runs/mine", "sparsegpt") == Path("runs/mine-sparsegpt").absolute()
    assert beside("/", "sparsegpt") is None
    one, other = (scratch_folder(tmp_path, FolderStorage(tmp_path / name)) for name in "ab")
    assert one.parent == other.parent == tmp_path
    assert one != other


def test_naming_a_scratch_disk_makes_nothing_there_until_there_is_something_to_keep(tmp_path):
    storage = FolderStorage(tmp_path / "run")
    storage.use_scratch(tmp_path / "scratch" / "run")
    assert not (tmp_path / "scratch").exists()
    (tmp_path / "run").mkdir()
    storage.new_folder("data/000000-00000000/biased", is_bulky=True)
    assert (tmp_path / "scratch" / "run" / "data" / "000000-00000000" / "biased").is_dir()


def test_what_is_not_there_is_not_deleted_as_a_file_since_another_process_may_make_it_a_folder(tmp_path, monkeypatch):
    storage = FolderStorage(tmp_path)
    monkeypatch.setattr(
        "pipeline.rundir.filesystem.remove_file", lambda path: pytest.fail(f"{path} was taken for a file")
    )
    storage.remove("progress/000000")
    (tmp_path / "progress" / "000000").mkdir(parents=True)
    storage.remove("progress/000000")
    assert not (tmp_path / "progress" / "000000").exists()
