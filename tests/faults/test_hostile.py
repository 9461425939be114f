"""Run directories that mean harm: an error of ours, never a traceback, a hang, a full disk, or a write elsewhere.

    pytest -n0 -s -m 'slow or not slow' tests/faults/test_hostile.py

Every record that is changed is signed again, as whoever means harm would do: digests stop accidents, not people.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.engine.verify import verify
from pipeline.errors import PipelineError
from pipeline.rundir import records as manifest
from pipeline.runs.garbage import collect_garbage
from pipeline.runs.lifecycle import reopen
from pipeline.runs.status import status
from pipeline.steps.lamp_plan import steps_of
from stages.errors import StageError
from tests.faults.test_damage import FLAGS, STEPS, _lampctl
from tests.small_models import save

QUICK, LONG = 50, 10_000
number_of_cases = pytest.mark.parametrize(
    "num_cases", [QUICK, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(6000)], id="all")]
)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A real run of a small model, stopped after two blocks; and around it a place where nothing may appear."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LAMPCTL_CACHE", str(folder / "cache"))
        model = save(folder / "model", "llama")
        _lampctl(patch, "init", model, *FLAGS, "--run-dir", "half")
        for step in STEPS[:6]:
            _lampctl(patch, step, "half")
    return folder / "half"


@pytest.fixture
def place(half, tmp_path) -> Path:
    return tmp_path / "inside" / "run"


def fresh(half: Path, place: Path) -> None:
    shutil.rmtree(place.parent, ignore_errors=True)
    place.parent.mkdir(parents=True)
    shutil.copytree(half, place, symlinks=True)


def examine(place: Path, tmp_path: Path) -> str:
    """What the commands that read do with it: "accepted", or the name of the error of ours."""
    outside = snapshot(tmp_path, place)
    try:
        run, config = reopen(place)
        status(run, config)
        verify(run, steps_of(run, config), is_deep=True)
        for commit in run.commits:
            for name, payload in commit.payloads.items():
                if run.is_released(name):
                    continue
                if payload.stream is not None:
                    stream = run.open_stream(name)
                    _ = [stream[i] for i in range(len(stream))]
                elif payload.kind == "file":
                    read_file(name, run.open_file(name))
        run.event("looked-at")
        collect_garbage(run, config, is_dry_run=False)
        return "accepted"
    except (PipelineError, StageError) as error:
        return type(error).__name__ if len(str(error)) < 5000 else "a message of its own length"
    finally:
        assert snapshot(tmp_path, place) == outside, "something was written outside the run directory"


def read_file(name: str, path: Path) -> None:
    from stages.formats.checkpoint_files import StateFile
    from stages.formats.pruning_masks import read_mask_file

    if name.startswith("masks/"):
        read_mask_file(path)
    else:
        _ = dict(StateFile(path))


def snapshot(tmp_path: Path, place: Path) -> dict[str, int]:
    return {
        str(path): path.lstat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path != place and not path.is_relative_to(place) and path != place.parent
    }


def resign(place: Path) -> None:
    """Make every digest right again, and the chain whole."""
    parent = sign(place / "run.json", {})
    for path in sorted((place / "commits").glob("*.json")):
        parent = sign(path, {"parent": parent})


def sign(path: Path, changes: dict) -> str:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
        return "0" * 64
    fields.update(changes)
    fields.pop("digest", None)
    try:
        fields["digest"] = manifest._digest(fields)
        path.write_bytes(manifest._file_bytes(fields))
    except (ValueError, UnicodeEncodeError, RecursionError):
        return "0" * 64
    return fields["digest"]


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, 0.5]),
    st.sampled_from(
        ["", "..", "../../x", "/etc/passwd", "a\x00b", "\ud800", "x" * 10_000, "data/../../x", "C:\\x", "~"]
    ),
    st.sampled_from(["nan", "inf", "9" * 5000, "cuda:99", "float99", "[" * 100]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=3),
    st.builds(lambda depth: _deep(depth), st.sampled_from([10, 500, 3000])),
)


def _deep(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def places_in(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places_in(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 4)):
            yield from places_in(value[index], (*path, index))


def put(value, path, new):
    if not path:
        return new
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(new, str) and new == "nan":
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def fuzz(num_cases: int, *strategies: st.SearchStrategy):
    options = settings(
        max_examples=num_cases, deadline=20_000, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    return lambda test: options(given(*strategies)(test))


@number_of_cases
@pytest.mark.parametrize("which", ["run.json", "a commit"])
def test_resigned_records_give_an_error_of_ours(half, place, tmp_path, num_cases, which):
    ends: dict[str, int] = {}
    records = ["run.json"] if which == "run.json" else [f"commits/{i:06d}.json" for i in range(6)]
    originals = {key: json.loads((half / key).read_text()) for key in records}

    @fuzz(num_cases, st.data())
    def case(data):
        fresh(half, place)
        key = data.draw(st.sampled_from(records))
        fields = copy.deepcopy(originals[key])
        for _ in range(data.draw(st.integers(1, 2))):
            try:
                found = list(places_in(fields))
            except RecursionError:
                break
            path = data.draw(st.sampled_from(found))
            fields = put(fields, path, data.draw(HOSTILE))
        try:
            (place / key).write_text(json.dumps(fields))
        except (UnicodeEncodeError, RecursionError, ValueError):
            return
        with contextlib.suppress(RecursionError):  # too deep to be signed: it is then refused for its digest
            resign(place)
        end = examine(place, tmp_path)
        ends[end] = ends.get(end, 0) + 1

    case()
    print(f"{which}, {sum(ends.values())} cases: {ends}")
    assert ends.get("DamagedData", 0) > num_cases / 5


@number_of_cases
def test_random_bytes_give_an_error_of_ours(half, place, tmp_path, num_cases):
    ends: dict[str, int] = {}
    keys = sorted(p.relative_to(half).as_posix() for p in half.rglob("*") if p.is_file())

    @fuzz(num_cases, st.sampled_from(keys), st.binary(max_size=200), st.integers(0, 400))
    def case(key, junk, at):
        fresh(half, place)
        data = (place / key).read_bytes()
        (place / key).write_bytes(data[:at] + junk + data[at + len(junk) :] if at < 300 else junk)
        end = examine(place, tmp_path)
        ends[end] = ends.get(end, 0) + 1

    case()
    print(f"any file, {sum(ends.values())} cases: {ends}")


def files_of(half: Path, kind: str) -> list[str]:
    run, _ = reopen(half)
    found = []
    for commit in run.commits:
        for name, payload in commit.payloads.items():
            if not run.is_released(name):
                found += [file.path for file in payload.files if _kind_of(name, file.path) == kind]
    return found


def _kind_of(name: str, path: str) -> str:
    if path.endswith("zarr.json"):
        return "zarr"
    return "weights" if path.endswith(".safetensors") else "chunk"


def replace_committed(place: Path, key: str, data: bytes) -> None:
    """Change a file, and the record of it."""
    (place / key).write_bytes(data)
    for path in (place / "commits").glob("*.json"):
        fields = json.loads(path.read_text())
        for payload in fields["payloads"].values():
            for file in payload["files"]:
                if file["path"] == key:
                    file.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        path.write_text(json.dumps(fields))
    resign(place)


@number_of_cases
def test_resigned_array_metadata_gives_an_error_of_ours(half, place, tmp_path, num_cases):
    ends: dict[str, int] = {}
    keys = files_of(half, "zarr")
    shapes = [[10**12], [2**40, 2**40], [0], [], [-1, 5], [1] * 40]
    codecs = [[], [{"name": "gzip", "configuration": {"level": 9}}], [{"name": "bytes"}, {"name": "zstd"}], "bytes"]

    @fuzz(num_cases, st.data())
    def case(data):
        fresh(half, place)
        key = data.draw(st.sampled_from(keys))
        fields = json.loads((place / key).read_text())
        choice = data.draw(st.sampled_from(["shape", "codecs", "data_type", "chunk_grid", "any", "spec"]))
        if choice == "shape":
            fields["shape"] = data.draw(st.sampled_from(shapes))
        elif choice == "codecs":
            fields["codecs"] = data.draw(st.sampled_from(codecs))
        elif choice == "data_type":
            fields["data_type"] = data.draw(st.sampled_from(["float64", "bool", "complex128", "string", "x", 7]))
        elif choice == "chunk_grid":
            fields["chunk_grid"]["configuration"]["chunk_shape"] = data.draw(st.sampled_from(shapes))
        elif choice == "any":
            path = data.draw(st.sampled_from(list(places_in(fields))))
            fields = put(fields, path, data.draw(HOSTILE))
        else:  # in the commit as well
            spec = data.draw(st.sampled_from(shapes))
            fields["shape"] = spec
            for path in (place / "commits").glob("*.json"):
                commit = json.loads(path.read_text())
                for payload in commit["payloads"].values():
                    if payload["stream"] and key.startswith(payload["root"]):
                        payload["stream"]["sample_shape"] = spec[1:]
                path.write_text(json.dumps(commit))
        try:
            replace_committed(place, key, json.dumps(fields).encode())
        except (UnicodeEncodeError, RecursionError, ValueError):
            return
        end = examine(place, tmp_path)
        ends[end] = ends.get(end, 0) + 1

    case()
    print(f"arrays, {sum(ends.values())} cases: {ends}")
    assert ends.get("DamagedData", 0) > num_cases / 3


@number_of_cases
def test_resigned_safetensors_headers_give_an_error_of_ours(half, place, tmp_path, num_cases):
    ends: dict[str, int] = {}
    keys = files_of(half, "weights")
    lengths = st.sampled_from([0, 1, 7, 2**31, 2**62, 2**64 - 1])
    offsets = st.tuples(*[st.sampled_from([-1, 0, 1, 100, 2**40, 2**63])] * 2)

    @fuzz(num_cases, st.data())
    def case(data):
        fresh(half, place)
        key = data.draw(st.sampled_from(keys))
        contents = (place / key).read_bytes()
        size = int.from_bytes(contents[:8], "little")
        header = json.loads(contents[8 : 8 + size])
        choice = data.draw(st.sampled_from(["length", "offsets", "shape", "any", "junk"]))
        name = data.draw(st.sampled_from([k for k in header if k != "__metadata__"]))
        if choice == "length":
            contents = struct.pack("<Q", data.draw(lengths)) + contents[8:]
        else:
            if choice == "offsets":
                header[name]["data_offsets"] = list(data.draw(offsets))
            elif choice == "shape":
                header[name]["shape"] = data.draw(st.sampled_from([[2**40], [2**40, 2**40], [-1], [0], []]))
            elif choice == "any":
                path = data.draw(st.sampled_from(list(places_in(header))))
                header = put(header, path, data.draw(HOSTILE))
            try:
                text = b"{" * 1000 if choice == "junk" else json.dumps(header).encode()
            except (RecursionError, ValueError):
                return
            contents = struct.pack("<Q", len(text)) + text + contents[8 + size :]
        replace_committed(place, key, contents)
        end = examine(place, tmp_path)
        ends[end] = ends.get(end, 0) + 1

    case()
    print(f"safetensors, {sum(ends.values())} cases: {ends}")
    assert ends.get("DamagedData", 0) + ends.get("DamagedFileError", 0) > num_cases / 3


@pytest.mark.parametrize("key", ["events.jsonl", "lease.json", "model", "progress", "commits/000007.json", "data"])
@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_links_out_of_the_run_directory_are_not_followed(half, place, tmp_path, key, target, lampctl):
    fresh(half, place)
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("mine")
    path = place / key
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.symlink_to(outside / "file" if target == "file" else outside if target == "folder" else outside / "new")
    for command in ("status", "verify", "gc", "resume"):
        answer = lampctl(command, place)
        assert answer.code in (0, 2, 3, 4, 5), (command, answer.err)
        assert "Traceback" not in answer.err
    assert [p.name for p in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"


def test_payload_behind_a_link_is_not_read(half, place, tmp_path, lampctl):
    fresh(half, place)
    key = files_of(half, "weights")[0]
    (tmp_path / "elsewhere").write_bytes((place / key).read_bytes())
    (place / key).unlink()
    (place / key).symlink_to(tmp_path / "elsewhere")
    answer = lampctl("verify", place, "--deep")
    assert answer.code == 4
    assert key in answer.out
    assert lampctl("resume", place).code == 0
    assert not (place / key).is_symlink()


def test_new_files_have_the_permissions_of_the_umask(half, place, lampctl):
    before = os.umask(0o022)
    try:
        fresh(half, place)
        shutil.rmtree(place)
        assert lampctl("init", half.parent / "model", *FLAGS, "--run-dir", place).code == 0
        assert lampctl("resume", place).code == 0
        assert lampctl("export", place, "--format", "packed").code == 0
        for path in place.rglob("*"):
            mode = path.stat().st_mode & 0o777
            assert mode == (0o755 if path.is_dir() else 0o644), (path, oct(mode))
    finally:
        os.umask(before)
