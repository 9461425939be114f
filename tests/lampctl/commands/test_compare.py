"""`lampctl compare`: runs and models in one table, each figure with its difference from the first row's."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

from lampctl.output.comparison import as_csv, as_json, as_markdown, compare
from pipeline.runs.comparison import ModelSummary
from pipeline.runs.status import EvaluationResult
from stages.metrics.details import OpenDetails
from stages.metrics.language import TextDetails
from tests.conftest import PRUNING_ALONE
from tests.pruned_folders import pruned_folder, share
from tests.small_models import save

DATA = (
    *("--calibration", "text:words.txt", "--num-samples", "4", "--seqlen", "64"),
    *("--evaluate", "text:words.txt", "--device", "cpu", *PRUNING_ALONE),
)


def result(which: str = "pruned", perplexity: float | None = 20.0, source: str = "c4", num_tokens: int = 640):
    details = TextDetails(num_tokens // 64, num_tokens, 10**6, 64)
    return EvaluationResult("evaluate/x", which, source, "perplexity", perplexity, False, details)


def standing(label: str, *results: EvaluationResult, **changes) -> ModelSummary:
    fields = {
        "base": "m",
        "method": "lamp",
        "goal": "70%",
        "steps_left": 0,
        "num_masked": 700,
        "num_prunable": 1000,
        "dense_bytes": 4000,
        "packed_bytes": None,
        "pruning_s": 10.0,
        "peak_memory_bytes": 100,
        "peak_device_bytes": None,
    }
    return ModelSummary(label=label, evaluations=results, **{**fields, **changes})


def test_compare_shows_differences_from_the_first_row():
    table = compare(
        [
            standing("a", result(perplexity=20.0), result("dense", 10.0)),
            standing("b", result(perplexity=25.0), num_masked=500, pruning_s=5.0),
        ]
    )
    assert [row.label for row in table.rows] == ["a", "b", "m"]
    perplexity, sparsity, size, seconds, memory = table.columns
    assert perplexity.key == "perplexity/c4@64"
    cells = [[table.cell(row, column) for column in table.columns] for row in table.rows]
    assert cells[0] == ["20.00", "70.0000%", "0 MB", "10 s", "0 MB"]
    assert cells[1] == ["25.00 (+25.0%)", "50.0000% (-20.00 pp)", "0 MB (+0.0%)", "5.0 s (-50.0%)", "0 MB (+0.0%)"]
    assert cells[2] == ["10.00 (-50.0%)", "-", "-", "-", "-"]
    assert table.delta(table.rows[1], sparsity) == pytest.approx(-0.2)
    assert table.delta(table.rows[1], seconds) == -5.0
    assert table.delta(table.rows[2], size) is None
    assert memory.title == "peak memory"


def test_rows_have_the_names_of_their_runs_in_csv_and_markdown():
    table = compare([standing("/here/runs/a", result(), base="/models/m"), standing("/here/runs/b/", base="/models/m")])
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [(row["label"], row["model"]) for row in rows] == [("a", "m"), ("b", "m")]
    assert "/" not in as_markdown(table)
    assert [row["label"] for row in json.loads(as_json(table))["rows"]] == ["/here/runs/a", "/here/runs/b/"]
    alike = compare([standing("/one/a"), standing("/two/a"), standing("s3://bucket/runs/a", base="org/m")])
    assert [row.name for row in alike.rows] == ["one/a", "two/a", "runs/a"]
    assert alike.rows[2].model_name == "org/m"


def test_an_unfinished_run_is_shown_as_such():
    table = compare([standing("a"), standing("b", steps_left=3)])
    assert [row.what for row in table.rows] == ["LAMP 70%", "LAMP 70%, unfinished"]
    assert [row["is_finished"] for row in json.loads(as_json(table))["rows"]] == [True, False]
    assert [row["is_finished"] for row in csv.DictReader(io.StringIO(as_csv(table)))] == ["True", "False"]


def test_the_dense_model_has_one_row_where_its_folder_is_given_too():
    dense = standing("/m", result(perplexity=11.0, source="ptb"), base="/m", method=None, goal=None, num_masked=0)
    table = compare([standing("/a", result("dense", 10.0), result(perplexity=12.0), base="/m"), dense])
    assert [(row.label, row.what) for row in table.rows] == [("/a", "LAMP 70%"), ("/m", "dense")]
    measured = {column.key: table.rows[1].values.get(column.key) for column in table.columns}
    assert (measured["perplexity/c4@64"], measured["perplexity/ptb@64"], measured["sparsity"]) == (10.0, 11.0, 0.0)
    other = compare([standing("/a", result("dense", 10.0), base="/m"), standing("/n", base="/n", method=None)])
    assert [row.what for row in other.rows] == ["LAMP 70%", "-", "dense"]


def test_compare_has_one_column_per_evaluation_set():
    table = compare([standing("a", result(num_tokens=640)), standing("b", result(num_tokens=704))])
    assert [column.key for column in table.columns[:2]] == ["perplexity/c4@64:640", "perplexity/c4@64:704"]
    assert [table.cell(table.rows[1], column) for column in table.columns[:2]] == ["-", "20.00"]


def test_compare_shows_infinite_perplexity_without_a_difference():
    table = compare([standing("a", result(perplexity=None)), standing("b", result(perplexity=5.0))])
    column = table.columns[0]
    assert [table.cell(row, column) for row in table.rows] == ["infinite", "5.00"]
    assert table.rows[0].values[column.key] == math.inf
    assert json.loads(as_json(table))["rows"][0]["figures"][column.key] == {"value": None, "delta": None}


def test_csv_json_and_markdown_hold_the_same_values():
    table = compare([standing("a|b", result()), standing("c", result(perplexity=30.0))])
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    record = json.loads(as_json(table))
    assert [row["label"] for row in rows] == [row["label"] for row in record["rows"]] == ["a|b", "c"]
    assert float(rows[1]["perplexity/c4@64_delta"]) == 10.0
    assert record["rows"][1]["figures"]["perplexity/c4@64"] == {"value": 30.0, "delta": 10.0}
    assert rows[0]["dense_bytes"] == "4000"
    head, rule, first, second = as_markdown(table).splitlines()
    assert head.count("|") == rule.count("|") == second.count("|")
    assert "a\\|b" in first


def test_compare_of_runs_uses_their_committed_metrics(lampctl, words, tmp_path):
    save(tmp_path / "m")
    for method in ("sparsegpt", "magnitude"):
        assert lampctl("run", "m", "--sparsity", 0.5, "--method", method, *DATA, "--run-dir", method).code == 0
    shown = lampctl("compare", "sparsegpt", "magnitude", "--json")
    assert shown.code == 0, shown.err
    first, second, original = shown.json["rows"]
    states = [lampctl("status", method, "--json").json for method in ("sparsegpt", "magnitude")]
    key = next(column["key"] for column in shown.json["columns"] if column["unit"] == "perplexity")
    for row, state in ((first, states[0]), (second, states[1])):
        pruned = next(e for e in state["evaluations"] if e["which"] == "pruned")
        assert row["figures"][key]["value"] == pruned["perplexity"]
        assert row["figures"]["sparsity"]["value"] == state["sparsity"] == 0.5
        assert row["figures"]["pruning_s"]["value"] == state["pruning_s"]
    assert original["is_original"]
    dense = next(e for e in states[0]["evaluations"] if e["which"] == "dense")
    assert original["figures"][key]["value"] == dense["perplexity"]
    assert second["figures"][key]["delta"] == second["figures"][key]["value"] - first["figures"][key]["value"]
    table = lampctl("compare", "sparsegpt", "magnitude/model").out
    assert "SparseGPT 50%" in table
    assert "magnitude 50%" in table
    assert "packed_bytes" not in {column["key"] for column in shown.json["columns"]}
    packed = lampctl("export", "magnitude", "--format", "packed", "--json").json
    again = lampctl("compare", "sparsegpt", "magnitude", "--json").json["rows"]
    assert again[0]["figures"]["packed_bytes"] is None
    assert again[1]["figures"]["packed_bytes"]["value"] == packed["packed_bytes"]


def test_compare_evaluate_equals_the_runs_perplexity(lampctl, words, tmp_path):
    save(tmp_path / "m")
    assert lampctl("run", "m", "--sparsity", 0.5, "--method", "magnitude", *DATA, "--run-dir", "r").code == 0
    (tmp_path / "r/model").rename(tmp_path / "elsewhere")
    call = ("compare", "r", "elsewhere", "m", "--evaluate", "text:words.txt", "--json")
    shown = lampctl(*call)
    assert shown.code == 0, shown.err
    run, moved, dense = shown.json["rows"]
    (original,) = lampctl("compare", "r", "--json").json["rows"][1:]
    assert (dense["is_original"], dense["label"]) == (True, str(tmp_path / "m"))
    key = next(column["key"] for column in shown.json["columns"] if column["unit"] == "perplexity")
    assert moved["figures"][key]["value"] == pytest.approx(run["figures"][key]["value"], rel=1e-6)
    assert dense["figures"][key]["value"] == pytest.approx(original["figures"][key]["value"], rel=1e-6)
    assert moved["figures"]["sparsity"]["value"] == 0.5
    assert moved["figures"]["dense_bytes"]["value"] == sum(
        p.stat().st_size for p in Path("elsewhere").glob("*.safetensors")
    )


@pytest.mark.parametrize("has_masks", [True, False])
def test_compare_counts_the_sparsity_of_a_model_folder(lampctl, tmp_path, has_masks):
    folder = pruned_folder(tmp_path / "m", "gpt2", mask_of=share(0.25))
    if not has_masks:
        for path in (folder / "masks").iterdir():
            path.unlink()
    row = lampctl("compare", "m", "--json").json["rows"][0]
    assert row["figures"]["sparsity"]["value"] == pytest.approx(0.25, abs=1e-3)
    assert row["method"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("m", "--json", "--csv"), "choose one"),
        (("m", "--eval-seqlen", "64"), "require --evaluate"),
        (("nothing",), "neither run.json nor config.json"),
        (("words.txt",), "unpack it first"),
    ],
)
def test_compare_names_what_cannot_be_compared(lampctl, words, tmp_path, flags, message):
    save(tmp_path / "m")
    answer = lampctl("compare", *flags)
    assert answer.code == 2
    assert message in answer.err


def test_compare_evaluate_is_refused_where_only_runs_are_given(lampctl, words, tmp_path):
    save(tmp_path / "m")
    flags = ("--method", "magnitude", "--evaluate", "", "--device", "cpu", "--run-dir", "r")
    assert lampctl("run", "m", "--sparsity", 0.5, *flags).code == 0
    answer = lampctl("compare", "r", "--evaluate", "text:words.txt")
    assert answer.code == 2
    assert "lampctl evaluate RUN" in answer.err


def test_another_metric_is_shown_with_its_own_digits_and_differences(monkeypatch):
    from stages.metrics.iou import SinglePointIoU
    from stages.metrics.registry import METRICS

    class Accuracy(SinglePointIoU):
        name, title, task, digits = "accuracy", "accuracy", "language", 3

    METRICS.register("accuracy", Accuracy)
    try:
        rows = [
            standing(label, EvaluationResult("e", "pruned", "pydocs", "accuracy", value, False, OpenDetails()))
            for label, value in (("a", 0.1252), ("b", 0.2819))
        ]
        markdown = as_markdown(compare(rows))
    finally:
        METRICS.unregister("accuracy")
    assert "0.125" in markdown
    assert "0.282 (+0.157)" in markdown
