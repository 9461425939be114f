"""Records on disk: the same bytes for the same record, and nothing accepted that was not written."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import ConfigMismatch, DamagedData
from pipeline.rundir.records import Payload, PayloadFile, RunManifest, StepCommit, StreamSpec

PATH = Path("commits/000000.json")
ATTEMPT = "000000-0123abcd"


def payload_file(path: str = f"data/{ATTEMPT}/pruned/block.safetensors") -> PayloadFile:
    return PayloadFile(path=path, size=5, sha256="ab" * 32)


def step_commit(**changes: Any) -> StepCommit:
    root = f"data/{ATTEMPT}/pruned"
    fields: dict[str, Any] = {
        "number": 0,
        "step": "prune-block/0",
        "parent": "0" * 64,
        "attempt": ATTEMPT,
        "payloads": {"pruned/0": Payload(kind="file", root=root, files=(payload_file(),))},
        "result": {"loss": 0.1, "layers": [{"name": "q", "num_masked": 3}]},
        "free": {"memory_gb": None},
        "started_at": datetime(2026, 1, 31, 12, tzinfo=UTC),
        "elapsed_s": 1.5,
        "peak_memory_bytes": 123,
    }
    return StepCommit.new(**{**fields, **changes})


def test_a_record_is_read_back_as_it_was() -> None:
    commit = step_commit()
    assert StepCommit.from_bytes(commit.to_bytes(), PATH) == commit
    assert StepCommit.from_bytes(commit.to_bytes(), PATH).to_bytes() == commit.to_bytes()


def test_the_same_record_has_the_same_bytes_whatever_the_order_of_its_keys() -> None:
    one, other = step_commit(result={"a": 1, "b": 2}), step_commit(result={"b": 2, "a": 1})
    assert one.to_bytes() == other.to_bytes()
    assert one.digest == other.digest


def test_every_field_counts_for_the_digest() -> None:
    changes: list[dict[str, Any]] = [
        {"step": "prune-block/1"},
        {"parent": "1" * 64},
        {"payloads": {}},
        {"result": {}},
        {"free": {}},
        {"elapsed_s": 1.6},
        {"peak_memory_bytes": None},
        {"started_at": datetime(2026, 2, 1, tzinfo=UTC)},
        {"number": 1},
    ]
    digests = {step_commit(**change).digest for change in changes}
    assert len(digests | {step_commit().digest}) == len(changes) + 1


def test_values_of_a_result_that_json_cannot_say_become_null() -> None:
    commit = step_commit(result={"perplexity": math.inf, "layers": [math.nan, 2.0], "pair": (1, -math.inf)})
    assert commit.result == {"perplexity": None, "layers": [None, 2.0], "pair": [1, None]}
    assert StepCommit.from_bytes(commit.to_bytes(), PATH) == commit


def test_elsewhere_they_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        step_commit(free={"limit": math.nan})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "data/../../x", "data//x", "data/./x", "", "a\\b", "a\0b"])
def test_a_payload_path_stays_inside(path: str) -> None:
    with pytest.raises(ValidationError):
        payload_file(path)


def test_a_payload_is_consistent() -> None:
    inside, outside = payload_file("data/x/s/zarr.json"), payload_file("data/y/s/zarr.json")
    spec = StreamSpec(num_samples=1, sample_shape=(2, 3), dtype="float32")
    chunk = payload_file("data/x/s/c.0.0.0")
    Payload(kind="stream", root="data/x/s", files=(inside, chunk), stream=spec)
    for wrong in (
        {"kind": "folder", "files": (inside, outside)},
        {"kind": "folder", "files": (inside, inside)},
        {"kind": "folder", "files": ()},
        {"kind": "file", "files": (inside, chunk)},
        {"kind": "stream", "files": (inside, chunk)},
        {"kind": "stream", "files": (inside,), "stream": spec},
        {"kind": "file", "files": (inside,), "stream": spec},
    ):
        with pytest.raises(ValidationError):
            Payload.model_validate({"root": "data/x/s", **wrong})


def test_a_commit_vouches_only_for_its_own_attempt() -> None:
    root = "data/000001-0123abcd/pruned"
    stranger = Payload(kind="file", root=root, files=(payload_file(f"{root}/a"),))
    with pytest.raises(ValidationError, match="does not lie in"):
        step_commit(payloads={"pruned/0": stranger})


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(step_commit().to_bytes()), **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe\x00garbage",
        b'{"schema_version": 1, "digest": "00"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        step_commit().to_bytes()[:-30],
        step_commit().to_bytes().replace(b"prune-block/0", b"prune-block/1"),
        edited(elapsed_s=math.nan),
        edited(extra=1),
        edited(schema_version=0),
        edited(schema_version=True),
        edited(number="0"),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_damage_is_named(data: bytes) -> None:
    with pytest.raises(DamagedData, match=r"commits/000000\.json is damaged: .*\. Do this\.$"):
        StepCommit.from_bytes(data, PATH, "Do this.")


def test_a_right_digest_does_not_make_a_wrong_record_right() -> None:
    """Fields are checked, too: a digest is no signature."""
    from pipeline.rundir.records import _digest

    for key, value in {"number": -1, "attempt": "../../etc", "payloads": [], "elapsed_s": "1", "extra": 1}.items():
        body = json.loads(step_commit().to_bytes())
        del body["digest"]
        body[key] = value
        with pytest.raises(DamagedData):
            StepCommit.from_bytes(json.dumps({**body, "digest": _digest(body)}).encode(), PATH)


@given(st.binary(max_size=200))
def test_random_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedData):
        StepCommit.from_bytes(data, PATH)


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, flip: int) -> None:
    data = bytearray(step_commit().to_bytes())
    data[position % len(data)] ^= flip
    try:
        read = StepCommit.from_bytes(bytes(data), PATH)
    except (DamagedData, ConfigMismatch):
        return
    assert read == step_commit()  # white space may change; nothing else


def test_a_newer_schema_is_not_damage() -> None:
    with pytest.raises(ConfigMismatch, match=r"newer lampctl \(schema 3.*update lampctl"):
        StepCommit.from_bytes(edited(schema_version=3, unheard_of={}), PATH)


def test_a_run_manifest_is_read_back(tmp_path: Path) -> None:
    manifest = RunManifest.new(
        created_at=datetime.now(UTC),
        config={"sparsity": 0.6, "evaluate": ["c4"]},
        provenance={"sparsity": "flag"},
        identity={"seed": 2**63},
        model={"files": {}},
        environment={"torch": "2.6"},
        budget=[{"layers": []}],
        plan=["calibrate", "export"],
    )
    assert RunManifest.from_bytes(manifest.to_bytes(), tmp_path / "run.json") == manifest
