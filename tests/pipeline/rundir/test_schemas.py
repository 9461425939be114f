"""Run directories of every schema that was released open and go on; newer ones are refused and left as they are."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.engine.verify import verify
from pipeline.errors import ConfigMismatch, DamagedData
from pipeline.rundir import migrations, records
from pipeline.rundir.records import RunManifest, StepCommit
from pipeline.rundir.run_directory import RunDirectory
from tests.faults.disks import Unflushed, using
from tests.faults.small_run import STEPS, go, require_clean, result

GOLDEN = Path(__file__).parents[2] / "golden"
SCHEMAS = sorted(path.name for path in GOLDEN.glob("schema-*"))


def test_every_schema_has_its_golden_run():
    assert [f"schema-{number}" for number in range(1, RunManifest.newest_schema + 1)] == SCHEMAS
    assert RunManifest.newest_schema == StepCommit.newest_schema


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_old_run_is_whole_and_goes_on_to_the_same_result(schema, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(GOLDEN / schema / "standin", place)
    before = {path: path.read_bytes() for path in (place / "commits").iterdir()}
    run = RunDirectory.open(place)
    assert len(run.commits) == 5
    assert not verify(run, STEPS, is_deep=True).damages
    with using(Unflushed()):
        worker = go(place)
        go(tmp_path / "new")
    assert worker.executed == [step.name for step in STEPS[5:]]
    require_clean(place, result(tmp_path / "new"))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_records_of_an_old_run_are_shown(schema, tmp_path, lampctl):
    shutil.copytree(GOLDEN / schema / "records", tmp_path / "run")
    answer = lampctl("status", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["is_finished"]
    assert answer.json["evaluations"][0]["perplexity"] > 1
    assert lampctl("status", tmp_path / "run", "--settings").code == 0


@pytest.mark.parametrize("which", ["run.json", "commits/000001.json"])
def test_a_newer_schema_is_refused_and_nothing_is_touched(which, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(GOLDEN / SCHEMAS[-1] / "standin", place)
    path = place / which
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "schema_version": RunManifest.newest_schema + 1, "something": "new"}))
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    with pytest.raises(ConfigMismatch, match=r"newer lampctl .*update lampctl"):
        go(place)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_migrations_are_applied_one_after_the_other_to_what_is_read(tmp_path, monkeypatch):
    """As it will be when there is a third schema: `steps` became `plan`, then it was turned into a list."""
    chain = {
        -1: lambda fields: {**{k: v for k, v in fields.items() if k != "steps"}, "plan": fields["steps"]},
        0: lambda fields: {**fields, "plan": fields["plan"].split()},
    }
    monkeypatch.setitem(migrations.MIGRATIONS, "RunManifest", {**migrations.MIGRATIONS["RunManifest"], **chain})
    new = json.loads((GOLDEN / SCHEMAS[-1] / "standin" / "run.json").read_text())
    old = {**new, "steps": " ".join(new["plan"]), "schema_version": -1}
    del old["plan"], old["digest"]
    for version in range(0, RunManifest.newest_schema):
        monkeypatch.setitem(migrations.MIGRATIONS["RunManifest"], version, chain.get(version, lambda fields: fields))
    old["digest"] = records._digest(old)
    data = records._file_bytes(old)
    read = RunManifest.from_bytes(data, "run.json")
    assert read.plan == new["plan"]
    assert read.digest == old["digest"], "the chain of commits is one of the files as they lie there"
    with pytest.raises(DamagedData, match="do not match its digest"):
        RunManifest.from_bytes(data.replace(b"calibrate", b"calibrete"), "run.json")


@pytest.mark.parametrize("version", [0, -5, 1.0, "1", None, True, [1]])
def test_a_schema_that_never_was_is_damage(version):
    fields = {"schema_version": version, "plan": []}
    fields["digest"] = records._digest(fields)
    with pytest.raises(DamagedData):
        RunManifest.from_bytes(records._file_bytes(fields), "run.json")
