"""The benchmark of GPUs, on a processor and a small shape: a row a method as it is done, kept by later calls."""

import pytest
import torch

from benchmarks.performance import gpu, models
from benchmarks.reporting import read_rows, write_rows
from tests.conftest import TINY_OPT

SMALL = ("--device", "cpu", "--shape", "tiny", "--num-samples", "2", "--seqlen", "32")


@pytest.fixture
def measured(tmp_path, monkeypatch, lampctl):
    """A function that calls the benchmark, and the runs that it has begun."""
    begun = []

    def call(command):
        arguments = command[len(gpu.LAMPCTL) :]
        begun.append(arguments[arguments.index("--method") + 1])
        answer = lampctl(*arguments)
        assert answer.code == 0, answer.err
        return 0.0, 0.0

    monkeypatch.setattr(models, "_TOKENIZER", str(TINY_OPT))
    monkeypatch.setitem(models.SHAPES, "tiny", models.Shape(32, 2, 3))
    monkeypatch.setattr(gpu, "call", call)

    def measure(*flags):
        gpu.main([*SMALL, *flags, "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
        return read_rows(tmp_path / "gpu.csv"), (tmp_path / "gpu.md").read_text()

    return measure, begun


def row_of(method, **values):
    row = dict.fromkeys(gpu._COLUMNS, "") | {f"seconds_{kind}": "0" for kind in (*gpu.KINDS, "other")}
    return {**row, "method": method, "num_samples": "2", "seqlen": "32", **values}


def test_each_method_has_its_row_and_no_method_is_measured_twice(measured, tmp_path):
    measure, begun = measured
    larger = row_of("SparseGPT", device="cpu", shape="tiny", blocks="3", seconds="3", peak_process_bytes="1000000000")
    write_rows(tmp_path / "gpu.csv", gpu._COLUMNS, [larger])
    rows, _ = measure("--methods", "SparseGPT", "--blocks", "2")
    assert [(row["method"], row["blocks"]) for row in rows] == [("SparseGPT", "3"), ("SparseGPT", "2")]
    rows, page = measure("--methods", "LAMP, effort low; SparseGPT", "--blocks", "2")
    assert begun == ["sparsegpt", "lamp"]
    assert [row["method"] for row in rows] == ["SparseGPT", "SparseGPT", "LAMP, effort low"]
    times = {name: float(value) for name, value in rows[-1].items() if name.startswith("seconds_")}
    assert sum(times.values()) == pytest.approx(float(rows[-1]["seconds"]), abs=0.05)
    assert times["seconds_prune-block"] > 0
    assert times["seconds_distill"] > 0
    assert times["seconds_generate"] == 0
    for heading in ("## tiny, 2 blocks, 2 x 32 tokens: cpu", "## tiny, 3 blocks, 2 x 32 tokens: cpu"):
        assert heading in page
    assert page.count("| SparseGPT | - | - | - |") == 2
    assert not [*(tmp_path / "work").glob("cpu-*")], "runs with a row are gone"


def test_a_run_is_kept_until_its_row_is_written(measured, tmp_path, monkeypatch):
    measure, _ = measured

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(gpu, "write_rows", full)
    with pytest.raises(OSError, match="no space left"):
        measure("--methods", "SparseGPT", "--blocks", "1")
    monkeypatch.undo()
    assert len([*(tmp_path / "work").glob("cpu-*/commits")]) == 1


def test_the_paper_s_figures_stand_beside_the_methods_that_it_measured():
    same = {"device": "H100", "shape": "opt-6.7b", "blocks": "32", "peak_process_bytes": "3000000000"}
    same["seconds_prune-block"] = "64"
    rows = [
        row_of("LAMP as published", seconds="640", peak_gpu_bytes="5200000000", **same),
        row_of("SparseGPT", seconds="320", peak_card_bytes="7100000000", **same),
    ]
    page = "\n".join(gpu.markdown(rows))
    assert "| SparseGPT | - | 7.1 GB | 8.3 GB | 3.0 GB | 320 s | 1.00 | 2.00 |" in page
    assert "| LAMP as published | 5.2 GB | - | 7.8 GB | 3.0 GB | 640 s | 2.00 | 2.00 |" in page


def test_an_unknown_method_and_a_missing_gpu_are_said(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--methods", "GPTQ"])
    assert "GPTQ is no method; there are SparseGPT; Wanda; LAMP as published;" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="to try the script: --device cpu"):
            gpu.main(["--methods", "SparseGPT"])
