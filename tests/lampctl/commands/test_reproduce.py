"""The paper's tables: what was published, what it would take, and a small one done."""

from __future__ import annotations

import csv
from importlib import resources

import pytest

from pipeline.errors import ConfigError
from pipeline.paper.estimates import KNOWN
from pipeline.paper.tables import TABLES, published, require_columns, settings_of, table_named
from stages.metrics.registry import METRICS
from stages.tasks.registry import TASKS
from tests.lampctl.cli.test_errors import hub_error
from tests.small_models import save


def test_every_number_of_the_paper_has_a_cell():
    cells = {
        (name, model, dataset, method, strategy)
        for name, table in TABLES.items()
        for model in table.models
        for dataset in table.datasets
        for method in table.methods
        for strategy in table.strategies
    }
    left = {key for key in published() if key not in cells}
    assert {strategy for *_, strategy in left} <= {"dense"}
    with resources.files("pipeline.paper").joinpath("results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(published()) == 887


def test_every_model_of_the_paper_has_sizes_and_each_table_is_about_one_task():
    for table in TABLES.values():
        (task,) = {KNOWN[model].task for model in table.models}
        assert task in TASKS
        if table.metric in METRICS:
            assert METRICS.get(table.metric).task == task


def test_table_columns_become_settings():
    assert settings_of(table_named("table1"), "70%", "lamp") == {"method": "lamp", "sparsity": 0.7}
    assert settings_of(table_named("table7"), "2:4+int3", "lamp") == {"method": "lamp", "pattern": "2:4", "bits": 3}
    assert settings_of(table_named("table7"), "2:4+int3", "wanda") is None
    assert settings_of(table_named("fig5"), "beta=0.2", "lamp") == {"sparsity": 0.7, "method": "lamp", "beta": "0.2"}
    assert require_columns(table_named("table1"), ["0.7", "50%"]) == ("50%", "70%")
    assert require_columns(table_named("fig3"), ["0.6"]) == ("alpha=0.6",)
    with pytest.raises(ConfigError, match=r"no column 0\.55"):
        require_columns(table_named("table1"), ["0.55"])
    with pytest.raises(ConfigError, match="no such table"):
        table_named("table10")


def test_dry_run_of_reproduce_needs_no_model(lampctl):
    answer = lampctl("reproduce", "table1", "--models", "opt-125m", "--sparsities", "0.5,0.7", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    plan = answer.json["plan"]["opt-125m"]
    assert plan["num_runs"] == 8
    assert plan["seconds"] > 0
    assert plan["download_bytes"] == 251_000_000
    lamp = {c["strategy"]: c["published"] for c in answer.json["cells"] if c["method"] == "lamp"}
    assert lamp == {"50%": 33.9, "70%": 65.2}
    shown = lampctl("reproduce", "table1", "--models", "opt-125m", "--sparsities", "0.5,0.7", "--dry-run")
    assert "(65.2)" in shown.out
    assert "251 MB" in shown.out
    for name in TABLES:
        data = ("--calibration", "pydocs") if TABLES[name].metric == "iou" else ()
        assert lampctl("reproduce", name, "--dry-run", *data).code == 0, name


def test_dry_run_refuses_what_a_run_would_refuse(lampctl, monkeypatch):
    from huggingface_hub import HfApi

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    def missing(*args, **kwargs):
        raise hub_error("RepositoryNotFoundError")

    for answers, model, code, says in (
        (missing, "nosuch", 2, "no such folder, alias or public model"),
        (unreachable, "mine/opt", 5, "which is out of reach"),
        (unreachable, "sam-vit-b", 2, "is about language models"),
    ):
        monkeypatch.setattr(HfApi, "model_info", answers)
        refused = lampctl("reproduce", "table1", "--models", f"opt-125m,{model}", "--dry-run")
        assert refused.code == code, refused.err
        assert f"{model}" in refused.err
        assert says in refused.err
        assert refused.out == ""


def test_an_empty_folder_for_the_runs_is_refused(lampctl):
    answer = lampctl("reproduce", "table1", "--models", "opt-125m", "--dry-run", "--out", "")
    assert answer.code == 2
    assert "is empty" in answer.err


def test_unreachable_model_of_a_table_is_one_line(lampctl, monkeypatch):
    from huggingface_hub import HfApi

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    answer = lampctl("reproduce", "table1", "--models", "opt-125m", "--sparsities", "0.5")
    assert answer.code == 5
    assert "comes from the Hugging Face hub, which is out of reach" in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_reproduce_runs_a_table_on_another_model(lampctl, tmp_path, words):
    save(tmp_path / "m", "opt")
    flags = ("--models", "m", "--sparsities", "0.5", "--num-samples", "4", "--seqlen", "32", "--epochs", "1")
    text = ("--calibration", "text:words.txt", "--evaluate", "wikitext2:words.txt", "--eval-max-tokens", "256")
    answer = lampctl("reproduce", "table1", *flags, *text, "--json")
    assert answer.code == 0, answer.err
    cells = answer.json["cells"]
    assert [cell["method"] for cell in cells] == ["magnitude", "wanda", "sparsegpt", "lamp"]
    assert all(cell["ours"] > 0 and cell["state"] == "done" and cell["published"] is None for cell in cells)
    again = lampctl("reproduce", "table1", *flags, *text)
    assert again.code == 0
    assert f"{cells[-1]['ours']:,.2f}" in again.out
    assert "[1/" not in again.err


def test_reproduce_refuses_models_and_data_that_fit_no_cell(lampctl, tmp_path, words):
    from tests import small_sam

    save(tmp_path / "m", "opt")
    sam, images = small_sam.save(tmp_path / "sam"), f"coco:{small_sam.coco(tmp_path / 'images')}"
    for call, says in (
        (("table1", "--models", "m", "--evaluate", "text:words.txt"), "measured on wikitext2"),
        (("table1", "--models", sam), "is about language models"),
        (("table4", "--models", "m", "--evaluate", images), "is about vision models"),
        (("table5", "--models", sam, "--evaluate", images), "needs images to calibrate on"),
        (("table4", "--models", sam, "--evaluate", images, "--calibration", images), "measured on sa1b"),
    ):
        answer = lampctl("reproduce", *call)
        assert answer.code == 2, answer.err
        assert says in answer.err
    assert not (tmp_path / "reproductions").exists()


def test_reproduce_keeps_models_of_one_name_and_other_settings_apart(lampctl, tmp_path, words):
    found = []
    for place, seed, samples in (("a/m", 0, "4"), ("b/m", 7, "4"), ("a/m", 0, "2")):
        save(tmp_path / place, "opt", seed=seed)
        flags = ("--sparsities", "0.5", "--methods", "sparsegpt", "--num-samples", samples, "--seqlen", "32")
        text = ("--calibration", "text:words.txt", "--evaluate", "wikitext2:words.txt", "--eval-max-tokens", "256")
        answer = lampctl("reproduce", "table1", "--models", place, *flags, *text, "--json")
        assert answer.code == 0, answer.err
        found.append(answer.json["cells"][0]["ours"])
    assert len(set(found)) == 3
