"""Records that were forged and signed again: a value that lampctl never writes is damage (exit 4), not a setting."""

import json

import pytest

from lampctl.cli.exit_codes import DAMAGED, exit_code
from pipeline.errors import DamagedData
from pipeline.rundir import records
from pipeline.runs.lifecycle import reopen
from pipeline.runs.status import status
from tests.pipeline.runs.golden_copy import GOLDEN, change_newest, copy_of_golden


def forge(place, changes):
    """Change values of run.json, and sign it again. The run has no commits."""
    path = place / "run.json"
    fields = json.loads(path.read_text())
    for keys, value in changes.items():
        *outer, last = keys.split("/")
        inner = fields
        for key in outer:
            inner = inner[key]
        inner[last] = value
    fields.pop("digest")
    path.write_bytes(records._file_bytes({**fields, "digest": records._digest(fields)}))


@pytest.mark.parametrize("schema", [1, 2])
def test_golden_runs_open_with_their_bytes_untouched(tmp_path, schema):
    place = copy_of_golden(tmp_path / "run", schema=schema)
    status(*reopen(place))
    original = GOLDEN / f"schema-{schema}" / "records"
    for path in original.rglob("*.json"):
        assert (place / path.relative_to(original)).read_bytes() == path.read_bytes()


SETTINGS = {
    "threads": 10**29,
    "damping": -1,
    "lr": "../../x",
    "scratch_dir": 3,
    "task_data": "relative/folder",
    "column_block": 10**13,
    "num_samples": "2",
    "seqlen": 32.5,
    "seed": -1,
    "refine": 1,
    "memory_limit": 8,
    "checkpoint_minutes": 1e308,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("part", ["config", "identity/settings", "both"])
def test_a_forged_setting_is_damage(tmp_path, name, part):
    place = copy_of_golden(tmp_path / "run", 0)
    parts = ["config", "identity/settings"] if part == "both" else [part]
    forge(place, {f"{part}/{name}": SETTINGS[name] for part in parts})
    with pytest.raises(DamagedData, match=name) as caught:
        reopen(place)
    assert exit_code(caught.value) == DAMAGED


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("identity/model/config.json/sha256", "../../x"),
        ("identity/model/config.json/size", 10**29),
        ("identity/model", {}),
        ("identity/data/pydocs", 3),
        ("model/max_positions", -1),
        ("model/hidden_size", 10**13),
        ("environment/device/num_threads", 10**29),
        ("environment/device/batch_tokens", 10**29),
        ("environment/packages", {"torch": 3}),
        ("provenance/lr", 3),
        ("plan", [3]),
        ("budget", [{"layers": []}]),
    ],
)
def test_a_forged_fact_is_damage(tmp_path, key, value):
    place = copy_of_golden(tmp_path / "run", 0)
    forge(place, {key: value})
    with pytest.raises(DamagedData):
        reopen(place)


@pytest.mark.parametrize(
    "fields",
    [
        {"elapsed_s": 1e308},
        {"elapsed_s": -1.0},
        {"peak_memory_bytes": 10**29},
        {"free": {"eval_seqlen": 10**13}},
        {"free": {"scratch_dir": 3}},
        {"free": {"scratch_dir": "relative"}},
        {"free": {"evaluate_dense": 1}},
        {"free": {"lr": 0.5}},  # decides the weights: not a runtime setting
        {"free": {"unknown": 1}},
    ],
    ids=str,
)
def test_a_forged_commit_is_damage(tmp_path, fields):
    place = copy_of_golden(tmp_path / "run")
    change_newest(place, **fields)
    with pytest.raises(DamagedData):
        reopen(place)


@pytest.mark.parametrize(
    "changes",
    [{"value": -5.0}, {"metric": "../x"}, {"source": 3}, {"details": {"seqlen": -1}}, {"source_digest": "../x"}],
    ids=str,
)
def test_a_forged_result_is_damage(tmp_path, changes):
    place = copy_of_golden(tmp_path / "run")
    newest = json.loads(sorted((place / "commits").iterdir())[-1].read_text())
    change_newest(place, result={**newest["result"], **changes})
    with pytest.raises(DamagedData):
        status(*reopen(place))


def test_a_training_keeps_one_of_its_epochs(tmp_path):
    place = copy_of_golden(tmp_path / "run", 5)
    newest = json.loads(sorted((place / "commits").iterdir())[-1].read_text())
    training = {**newest["result"]["training"], "kept_epoch": 2}
    change_newest(place, result={**newest["result"], "training": training})
    with pytest.raises(DamagedData, match="epoch 2 was kept, of 1"):
        status(*reopen(place))


@pytest.mark.parametrize("key", ["num_samples", "sample_shape"])
def test_a_stream_larger_than_any_disk_is_damage(tmp_path, key):
    place = copy_of_golden(tmp_path / "run", 1)
    newest = json.loads(sorted((place / "commits").iterdir())[-1].read_text())
    payloads = newest["payloads"]
    spec = next(iter(payloads.values()))["stream"]
    spec[key] = 10**29 if key == "num_samples" else [10**29]
    change_newest(place, payloads=payloads)
    with pytest.raises(DamagedData, match=key):
        reopen(place)
