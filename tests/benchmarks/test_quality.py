"""The quality benchmark's table from rows, and which cells are run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quality import cells, sections

ROOT = Path(__file__).parents[2]


def row(method: str, draw: str, perplexity: float, point: str = "70%", seconds: float = 10, **more: str) -> dict:
    amount = ("-",) * 3 if draw == "-" else ("words", "32", "256")
    return {
        **dict(zip(("calibration", "num_samples", "seqlen"), amount, strict=True)),
        **{"model": "m", "evaluated": "40x256", "point": point, "method": method, "draw": draw},
        **{"perplexity_wikitext2": str(perplexity), "sparsity": "0.7", "pattern_held": "-", "seconds": "11"},
        **{
            "cpu_seconds": str(seconds),
            "peak_memory_mb": "1000",
            "threads": "1",
            "jobs": "1",
            "settings": "",
            "software": "s",
            "machine": "m",
        },
        **more,
    }


def test_ratio_is_over_the_draws_that_both_have():
    rows = [row("SparseGPT", "0", 100), row("SparseGPT", "32", 400), row("Wanda", "32", 600), row("Wanda", "64", 1)]
    (section,) = sections.sections_of(rows)
    by_name = {line.method: line for line in section.lines}
    assert sections.ratio_to_reference(section, by_name["Wanda"], "wikitext2") == 1.5
    assert sections.ratio_to_reference(section, by_name["SparseGPT"], "wikitext2") == 1


def test_what_looks_at_no_data_stands_in_every_section_against_all_draws():
    rows = [row("magnitude", "-", 900), row("SparseGPT", "0", 100), row("SparseGPT", "32", 200)]
    rows.append(row("SparseGPT", "0", 50, num_samples="128"))
    small, large = sections.sections_of(rows)
    for section, ratio in ((small, 6), (large, 18)):
        line = next(line for line in section.lines if line.method == "magnitude")
        assert sections.ratio_to_reference(section, line, "wikitext2") == ratio


def test_frontier_marks_what_no_faster_method_beats():
    rows = [
        *(row("SparseGPT", "0", 300, seconds=10), row("LAMP as published", "0", 310, seconds=20)),
        *(row("LAMP, effort high", "0", 100, seconds=40), row("LAMP, effort medium", "0", 150, seconds=30)),
    ]
    (section,) = sections.sections_of(rows)
    found = [(line.method, is_best) for line, is_best in sections.frontier(section.lines, "wikitext2")]
    assert found == [
        *(("SparseGPT", True), ("LAMP as published", False)),
        *(("LAMP, effort medium", True), ("LAMP, effort high", True)),
    ]


def test_page_tells_the_spread_and_a_broken_pattern():
    rows = [row("SparseGPT", draw, value, "2:4", pattern_held="0.972000") for draw, value in (("0", 10), ("32", 30))]
    page = "\n".join(sections.markdown(rows))
    assert "| 2:4 | SparseGPT | 0, 32 | 20.0 (10.0 to 30.0) | 1.00 | 70.000% | 11 | 10 | 1000 |" in page
    assert "breaks the pattern in 2.80% of its groups" in page


def test_a_cell_is_measured_once_and_again_when_its_settings_change(tmp_path):
    key = {"point": "70%", "method": "m"}
    table = cells.Table(tmp_path / "table.csv", tuple(key))

    def cell(settings: str, value: int) -> cells.Cell:
        command = (sys.executable, "-c", f"print('talk'); print('{json.dumps({'p': value})}')")
        work = cells.folder_for(key, settings, tmp_path)
        return cells.Cell(key, settings, work, (command,), lambda reports: {"perplexity": str(reports[0]["p"])})

    for settings, value in (("a", 1), ("a", 2), ("b", 3)):
        assert cells.run_cells([cell(settings, value)], table) == []
        assert [r["perplexity"] for r in table.rows()] == ["3" if settings == "b" else "1"]


def test_a_failed_cell_is_told_and_the_others_run(tmp_path, capsys):
    table = cells.Table(tmp_path / "table.csv", ("name",))
    bad = cells.Cell({"name": "bad"}, "", tmp_path / "bad", ((sys.executable, "-c", "exit('why')"),), lambda _: {})
    good = cells.Cell({"name": "good"}, "", tmp_path / "good", ((sys.executable, "-c", "print('{}')"),), lambda _: {})
    assert cells.run_cells([bad, good], table) == ["bad"]
    assert [r["name"] for r in table.rows()] == ["good"]
    assert "why" in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--quick"]])
def test_the_plan_can_be_shown_without_running(tmp_path, form):
    command = [sys.executable, "-m", "benchmarks.quality", "--dry-run", "--calibration", "pydocs", *form]
    command += ["--evaluate", "pydocs", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--method sparsegpt --pattern 2:4 --bits 4" in shown
    assert "--method wanda --pattern 2:4 --bits 4" not in shown
