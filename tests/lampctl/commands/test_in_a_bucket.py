"""A whole run in a bucket: every command, another machine half-way, a scratch disk that is lost."""

import json
from pathlib import Path

import pytest

from tests.buckets import s3
from tests.conftest import PRUNING_ALONE
from tests.small_models import save

SMALL = (
    *("--sparsity", "0.5", "--num-samples", "3", "--seqlen", "16", "--eval-seqlen", "16", "--eval-max-tokens", "64"),
)
FLAGS = (*SMALL, "--epochs", "1", "--refine-epochs", "1")
PLACE = "s3://bucket/runs/mine"


@pytest.fixture
def server(monkeypatch):
    with s3(monkeypatch) as proxy:
        yield proxy


def new_machine(monkeypatch, tmp_path, name):
    """An empty disk."""
    monkeypatch.setenv("LAMPCTL_CACHE", str(tmp_path / name))


def digests(lampctl, place):
    commits = read_all(place) if place.startswith("s3") else [json.loads(p.read_text()) for p in commit_files(place)]
    files = next(c for c in commits if c["step"] == "export")["payloads"]["model"]["files"]
    return {Path(file["path"]).name: file["sha256"] for file in files}


def commit_files(place):
    return sorted(Path(place, "commits").iterdir())


def read_all(place):
    from pipeline.rundir.storage.locate import locate

    storage = locate(place)
    return [json.loads(storage.read(f"commits/{name}")) for name in storage.names("commits")]


@pytest.mark.parametrize("scratch", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_command_works_in_a_bucket_and_on_a_second_machine(
    lampctl, server, tmp_path, monkeypatch, words, scratch
):
    model = save(tmp_path / "m", "llama", num_blocks=2)
    data = ("--calibration", f"text:{words}", "--evaluate", f"text:{words}")
    quiet = lampctl("run", model, *FLAGS, *data, "--run-dir", "quiet")
    assert quiet.code == 0, quiet.err

    new_machine(monkeypatch, tmp_path, "first")
    more = ("--scratch-dir", tmp_path / "ssd") if scratch else ()
    assert lampctl("init", model, *FLAGS, *data, *more, "--run-dir", PLACE).code == 0
    for command in ("calibrate", "capture", "prune-block", "refine-block", "compensate-block"):
        answer = lampctl(command, PLACE)
        assert answer.code == 0, answer.err
    assert bool(list((tmp_path / "ssd").rglob("c.0*"))) == scratch
    in_bucket = [key for key in server_keys() if "biased" in key]
    assert bool(in_bucket) != scratch

    new_machine(monkeypatch, tmp_path, "second")
    answer = lampctl("status", PLACE)
    assert answer.code == 0, answer.err
    assert "next: prune-block/1" in answer.out
    more = ("--scratch-dir", tmp_path / "another ssd") if scratch else ()
    answer = lampctl("resume", PLACE, *more)
    assert answer.code == 0, answer.err
    assert ("is made again" in answer.err) == scratch
    assert f"{PLACE}/model" in answer.out
    assert digests(lampctl, PLACE) == digests(lampctl, "quiet")
    assert not (tmp_path / "second" / "buckets").exists() or not list((tmp_path / "second" / "buckets").iterdir())

    new_machine(monkeypatch, tmp_path, "third")
    for command in (("verify", PLACE, "--deep"), ("gc", PLACE), ("resume", PLACE), ("status", PLACE, "--json")):
        answer = lampctl(*command)
        assert answer.code == 0, (command, answer.err)
    again = lampctl("evaluate", PLACE, "--eval-seqlen", "8")
    assert again.code == 0, again.err
    assert lampctl("export", PLACE, "--format", "packed").code == 0
    assert lampctl("export", "--unpack", "mine.packed.safetensors", "--out", "unpacked").code == 0
    quiet_model = {p.name: p.read_bytes() for p in Path("quiet/model").iterdir() if p.suffix == ".safetensors"}
    assert {p.name: p.read_bytes() for p in Path("unpacked").iterdir() if p.suffix == ".safetensors"} == quiet_model
    view = {key: value for key, value in server_objects().items() if key.startswith("model/")}
    assert {Path(k).name: v for k, v in view.items() if k.endswith(".safetensors") and "masks" not in k} == quiet_model


def server_objects():
    from pipeline.rundir.storage.locate import locate

    storage = locate(PLACE)
    return {key: storage.read(key) for key in storage.objects.sizes("")}


def server_keys():
    return list(server_objects())


def test_baseline_in_a_bucket_is_beside_the_run_and_shares_its_calibration_set(lampctl, server, tmp_path, words):
    model = save(tmp_path / "m", "llama")
    data = ("--calibration", f"text:{words}", "--evaluate", "")
    flags = (
        *SMALL,
        *PRUNING_ALONE,
        *data,
        "--method",
        "wanda",
        "--baseline",
        "sparsegpt",
        "--run-dir",
        PLACE,
        "--json",
    )
    answer = lampctl("run", model, *flags)
    assert answer.code == 0, answer.err
    report = answer.json
    assert report["run"] == PLACE
    assert report["baselines"][0]["run"] == f"{PLACE}-sparsegpt"
    shared = read_all(f"{PLACE}-sparsegpt")[0]["result"]
    assert shared["shared_with"]


def test_missing_run_bucket_and_scheme_are_named(lampctl, server, tmp_path):
    answer = lampctl("resume", "s3://bucket/nothing/here")
    assert answer.code == 2
    assert "there is no run at s3://bucket/nothing/here" in answer.err
    answer = lampctl("status", "s3://no-such-bucket/run")
    assert answer.code == 5
    assert "there is no such bucket" in answer.err
    answer = lampctl("status", "http://somewhere/run")
    assert answer.code == 2
    assert "s3://..." in answer.err
