"""Take each safeguard away, one at a time: a proof must notice. Otherwise the proof proves nothing.

    pytest -n0 -s -m 'slow or not slow' tests/faults/test_mutations.py

A safeguard is a flush, a create-only write or the check of a digest. Each is removed by a change of one function, and
the crashes, power cuts, races and damages of the other files are tried until one of them ends in a wrong result.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.engine import verify
from pipeline.errors import DamagedData, PipelineError
from pipeline.rundir import filesystem, run_directory, zarr_store
from pipeline.rundir.records import Record
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.storage.local import FolderStorage
from tests.faults.disks import Crash, PowerCutAt, Unflushed, using
from tests.faults.small_run import STEPS, go, require_clean, result
from tests.faults.test_crashes import cut

# Each missing safeguard shows within a few.
_NUM_SEEDS, _NUM_RACES = 40, 10


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("quiet") / "run"
    with using(Unflushed()):
        go(place)
    return result(place)


@dataclass(frozen=True)
class Mutation:
    """A safeguard that is missing, and the proof that has to notice."""

    name: str
    owner: object
    attribute: str
    replacement: Callable
    proof: Callable[[dict, Path], bool]  # whether something went wrong


def power_cuts(expected: dict, tmp_path: Path) -> bool:
    """Lost commits, wrong results, or a run that cannot go on, after a power cut."""
    for seed in range(_NUM_SEEDS):
        place = tmp_path / "some" / "where" / "run"
        shutil.rmtree(tmp_path / "some", ignore_errors=True)
        place.parent.mkdir(parents=True)
        chance = random.Random(seed)
        try:
            if not cut(place, chance.randrange(560), seed):
                require_clean(place, expected)
            with using(Unflushed()):
                before = committed(place)
                go(place)
            assert committed(place)[: len(before)] == before
            require_clean(place, expected)
        except (AssertionError, PipelineError, OSError):
            return True
    return False


def damaged_commit_is_noticed_late(expected: dict, tmp_path: Path) -> bool:
    """After a power cut, a commit whose payload is not whole must never be there: mending it would hide it."""
    for seed in range(_NUM_SEEDS):
        place = tmp_path / "run"
        shutil.rmtree(place, ignore_errors=True)
        calls = PowerCutAt(place, random.Random(seed).randrange(560), seed)
        try:
            with using(calls), contextlib.suppress(Crash):
                go(place)
            calls.survivors()
            if not (place / "run.json").exists():
                continue
            run = RunDirectory.open(place)
            # What was being released may be half gone, and is missed by nobody.
            if any(damage.is_needed for damage in verify.verify(run, STEPS, is_deep=True).damages):
                return True
        except (DamagedData, PipelineError):
            return True
    return False


def committed(place: Path) -> list[bytes]:
    folder = place / "commits"
    return [path.read_bytes() for path in sorted(folder.glob("0*.json"))] if folder.exists() else []


def races(expected: dict, tmp_path: Path) -> bool:
    """Two chains, or a commit that was replaced, by eight runners at once."""
    for turn in range(_NUM_RACES):
        place = tmp_path / f"race{turn}"
        seen: dict[str, set[bytes]] = {}
        ended = threading.Event()

        def watch(place=place, seen=seen, ended=ended):
            while not ended.is_set():
                for path in (place / "commits").glob("0*.json"):
                    with contextlib.suppress(OSError):
                        seen.setdefault(path.name, set()).add(path.read_bytes())

        def runner(place=place):
            with contextlib.suppress(PipelineError, AssertionError, OSError):
                go(place)

        threads = [threading.Thread(target=runner) for _ in range(8)]
        watcher = threading.Thread(target=watch)
        watcher.start()
        with using(Unflushed()):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        ended.set()
        watcher.join()
        try:
            assert all(len(versions) == 1 for versions in seen.values()), "a commit was replaced"
            with using(Unflushed()):
                go(place)
            require_clean(place, expected)
        except (AssertionError, PipelineError, OSError):
            return True
        shutil.rmtree(place)
    return False


def damages(expected: dict, tmp_path: Path) -> bool:
    """A flipped bit in any file that a commit names, or in a record, that nobody notices."""
    place = tmp_path / "run"
    with using(Unflushed()):
        go(place)
    run = RunDirectory.open(place)
    keys = [file.path for commit in run.log for payload in commit.payloads.values() for file in payload.files]
    keys += ["run.json", *(f"commits/{commit.number:06d}.json" for commit in run.log)]
    for key in keys:
        if not (place / key).exists():
            continue
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(place, copy)
        data = bytearray((copy / key).read_bytes())
        # Of run.json, the last digit of a year: nothing but the digest of the record can tell.
        is_manifest = key == "run.json"
        data[data.index(b'"created_at": "2026') + 18 if is_manifest else len(data) // 2] ^= 1
        (copy / key).write_bytes(data)
        try:
            if not verify.verify(RunDirectory.open(copy), STEPS, is_deep=True).damages:
                return True
        except PipelineError:
            continue
    return False


def reads_damaged(expected: dict, tmp_path: Path) -> bool:
    """A file that is read for a step although it is not what was committed."""
    place = tmp_path / "run"
    with using(Unflushed()), pytest.raises(Crash):
        run_until(place, "prune-block/1")
    run = RunDirectory.open(place)
    for name in ("biased/1", "compensated/1"):
        file = run.payload(name).files[-2 if name.startswith("biased") else 0]
        path = place / file.path
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(_with_crc(bytes(data)) if name.startswith("biased") else data)
        try:
            if name.startswith("biased"):
                stream = run.open_stream(name)
                _ = [stream[i] for i in range(len(stream))]
            else:
                run.open_file(name)
        except DamagedData:
            continue
        return True
    return False


def _with_crc(data: bytes) -> bytes:
    """The chunk with a checksum that fits: what the codec of the store would let through."""
    import google_crc32c

    body = data[:-4]
    return body + google_crc32c.value(body).to_bytes(4, "little")


def run_until(place: Path, step: str) -> None:
    from tests.faults.small_run import StandIn

    execute = StandIn.execute

    def stopping(self, wanted, attempt, callbacks):
        if wanted.name == step:
            raise Crash
        return execute(self, wanted, attempt, callbacks)

    StandIn.execute = stopping
    try:
        go(place)
    finally:
        StandIn.execute = execute


def nothing(*args, **kwargs) -> None:
    """The safeguard that is not there."""


def _unflushed_write(path, data):
    filesystem.write_file(path, data)


def _replacing_create(self, key, data):
    path = self.folder / key
    filesystem.make_folder(path.parent)
    filesystem.replace_file(path, data)


def _plain_folder(path: Path) -> None:
    """Without its name being flushed."""
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            filesystem.calls.make_folder(folder)


def _unlinked(path: Path, data: bytes) -> None:
    temporary = filesystem._beside(path, "tmp")
    filesystem._write_flushed(temporary, data)
    filesystem.rename(temporary, path)
    filesystem.flush_folder(path.parent)


MUTATIONS = (
    Mutation(
        "files are not flushed before a commit", filesystem, "flush_tree", nothing, damaged_commit_is_noticed_late
    ),
    Mutation("a commit's own bytes are not flushed", filesystem, "_write_flushed", _unflushed_write, power_cuts),
    Mutation("names in folders are not flushed", filesystem, "flush_folder", nothing, power_cuts),
    Mutation("single files are not flushed", filesystem, "_flush", nothing, power_cuts),
    Mutation("a payload is not kept before its commit", FolderStorage, "keep", nothing, damaged_commit_is_noticed_late),
    Mutation("a commit replaces one that is there", FolderStorage, "create", _replacing_create, races),
    Mutation("a commit is renamed into place", filesystem, "write_new", _unlinked, races),
    Mutation(
        "the folder of a commit is not made durably",
        filesystem,
        "make_folder",
        _plain_folder,
        power_cuts,
    ),
    Mutation("digests are not compared by verify", verify, "_digest_damage", nothing, damages),
    Mutation("records are not compared with their digests", Record, "from_bytes", None, damages),
    Mutation("chunks are not compared when they are read", zarr_store, "_is", lambda data, file: True, reads_damaged),
    Mutation("files are not compared when they are read", run_directory, "FileDigest", None, reads_damaged),
)


def _without_digest(cls, data, path, remedy=""):
    """The record, parsed without a comparison with its digest."""
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:  # a flipped bit may break the text itself
        raise DamagedData(str(error)) from error


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_each_removed_safeguard_makes_a_proof_fail(quiet, tmp_path, monkeypatch, mutation):
    replacement = mutation.replacement
    if mutation.owner is Record:
        replacement = classmethod(_without_digest)  # type: ignore[arg-type]
    if mutation.attribute == "FileDigest":

        class Equal:
            def __init__(self, *args):
                """Equal to anything."""

            def __eq__(self, other):
                return True

            def __ne__(self, other):
                return False

            __hash__ = None  # type: ignore[assignment]

        replacement = Equal
    monkeypatch.setattr(mutation.owner, mutation.attribute, replacement)
    assert mutation.proof(quiet, tmp_path), f"nobody noticed that {mutation.name}"


@pytest.mark.parametrize("proof", [power_cuts, damaged_commit_is_noticed_late, races, damages, reads_damaged])
def test_every_proof_passes_with_all_safeguards(quiet, tmp_path, proof):
    assert not proof(quiet, tmp_path)
