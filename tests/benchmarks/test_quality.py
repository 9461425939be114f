"""The quality benchmark: its plan, its table beside the plan, its picture, and which cells are run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.quality import cells, figure, methods, page, plan, sections
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.parts import CORE, KEY, PARTS, Study
from benchmarks.quality.texts import C4_FIRST, EMBEDDED, Text, c4_calibration, default_evaluation
from tests import warm_python

ROOT = Path(__file__).parents[2]
STUDY = Study()


def row(method: str, draw: str, perplexity: float, point: str = "70%", seconds: float | str = 10, **more: str) -> dict:
    amount = ("-",) * 3 if draw == "-" else (STUDY.calibration, "128", "256")
    return {
        **dict(zip(("calibration", "num_samples", "seqlen"), amount, strict=True)),
        **{"model": STUDY.model, "evaluated": STUDY.evaluated, "point": point, "method": method, "draw": draw},
        **{"perplexity_wikitext2": str(perplexity), "sparsity": "0.7", "pattern_held": "-", "seconds": "11"},
        **{"cpu_seconds": str(seconds), "peak_memory_mb": "1000", "threads": "1", "jobs": "1", "settings": ""},
        **{"software": "s", "machine": "m", "code": "c"},
        **more,
    }


def section_of(rows: list[dict], name: str = CORE) -> sections.Section:
    (study,) = sections.studies_of(rows)
    return next(section for section in sections.sections_of(rows, study) if section.name == name)


def setup(tmp_path: Path, **changes: object) -> plan.Setup:
    texts = {"calibration": Text("wikitext2-valid", "text:valid"), "c4": Text(C4_FIRST, "text:first")}
    numbers = {"eval_seqlen": 256, "eval_max_tokens": 40 * 256, "task_limit": 500}
    folders = {"task_data": tmp_path / "tasks", "work": tmp_path, "peer_python": tmp_path / "python"}
    evaluation = (Text("wikitext2", "text:test"), Text("c4", "text:second"))
    return plan.Setup(**{"model": "smollm2-135m", "evaluation": evaluation, **texts, **numbers, **folders, **changes})


def test_every_point_has_its_first_draw_before_any_has_a_second(tmp_path):
    names = [cell.name.removeprefix("smollm2-135m 40x256 ") for cell in plan.cells_of([CORE], setup(tmp_path))]
    tokens = "wikitext2-valid 128 256"
    assert names[:6] == [
        "- - - - dense -",
        *(f"{tokens} 70% {method} 0" for method in ("SparseGPT", "ALPS", "LAMP as published", "LAMP")),
        f"{tokens} 2:4 SparseGPT 0",
    ]
    assert [name.rpartition(" ")[2] for name in names[1:]] == ["0"] * 20 + ["128"] * 12 + ["256"] * 12
    points = dict.fromkeys(name.split(" ")[3] for name in names[1:21])
    assert list(points) == ["70%", "2:4", "80%", "50%", "2:4+int4"]


def test_a_model_that_is_measured_on_other_texts_has_rows_and_tables_of_their_own(tmp_path):
    usual, other = setup(tmp_path).study, setup(tmp_path, evaluation=(Text("pydocs", "pydocs"),)).study
    assert (usual.evaluated, other.evaluated) == ("40x256", "40x256 of pydocs")
    rows = [row("LAMP", "0", 90), row("LAMP", "0", 25, evaluated=other.evaluated)]
    assert [study.evaluated for study in sections.studies_of(rows)] == [usual.evaluated, other.evaluated]
    text = "\n".join(page.markdown(rows))
    assert "measured on 40 x 256 tokens of each text" in text
    assert "measured on 40 x 256 tokens of pydocs" in text


def test_a_method_in_another_arithmetic_differs_in_nothing_else():
    for method in (methods.OURS_TRAINS_BF16, methods.OURS_STREAMS_BF16, methods.OURS_BF16):
        flags, usual = methods.flags_of(method, "70%"), methods.flags_of(methods.OURS, "70%")
        assert "bfloat16" in flags
        assert set(flags) - {"bfloat16", "--train-dtype", "float32"} == set(usual) - {"float32"}


def test_the_published_method_has_nothing_of_ours_and_ours_is_the_default():
    assert " ".join(methods.flags_of("LAMP as published", "2:4")) == (
        "--method lamp --pruner sparsegpt --loss mse --no-refine --no-held-out --no-distill "
        "--lr 1e-3 --epochs 2 --dtype float32 --pattern 2:4"
    )
    assert " ".join(methods.flags_of("LAMP", "70%")) == "--method lamp --dtype float32 --sparsity 0.7"


def test_every_method_and_point_of_the_plan_has_its_flags_and_its_place_in_tables(tmp_path):
    for cell in plan.cells_of(list(PARTS), setup(tmp_path)):
        assert cell.key["method"] in methods.ORDER
        assert cell.commands
    for part in PARTS.values():  # a table has one amount of calibration
        assert len({(grid.num_samples, grid.seqlen, grid.is_on_c4, grid.is_tasks) for grid in part.grids}) == 1


def test_what_cannot_be_run_here_is_left_out_with_its_reason(tmp_path):
    lacking = setup(tmp_path, c4=None, task_data=None, peer_python=None)
    everywhere = len(plan.cells_of(list(PARTS), setup(tmp_path)))
    reasons = plan.left_out(list(PARTS), lacking)
    assert sorted(reasons.values()) == [7, 8, 8]
    assert len(plan.cells_of(list(PARTS), lacking)) == everywhere - 7 - 8 - 8
    embedded = setup(tmp_path, calibration=Text(EMBEDDED, EMBEDDED))
    assert plan.left_out([CORE], embedded) == {"pydocs is too short for a second draw": 24}


def test_the_part_on_c4_reads_documents_that_none_is_measured_on(tmp_path):
    texts, work = tmp_path / "text", tmp_path / "work"
    texts.mkdir()
    documents = [json.dumps({"prefix": f"<{i}", "gold_completion": ">"}) for i in range(742)]
    (texts / "c4_prompts.pf-decoding.jsonl").write_text("\n".join(documents))
    (texts / "wikitext-2-raw.wiki.test.raw").write_text("words")
    calibration, (_, measured) = c4_calibration(work, texts), default_evaluation(work, texts)
    assert Path(calibration.source.removeprefix("text:")).read_text().split() == [f"<{i}>" for i in range(740)]
    assert Path(measured.source.removeprefix("text:")).read_text().split() == ["<740>", "<741>"]
    commands = [command for cell in plan.cells_of(["c4"], setup(tmp_path)) for command in cell.commands]
    assert all("text:first" in command for command in commands if "run" in command)


def test_ratio_is_over_the_draws_that_both_have():
    published = "LAMP as published"
    rows = [row(published, "0", 100), row(published, "128", 400), row("LAMP", "128", 600), row("LAMP", "256", 1)]
    section = section_of(rows)
    by_name = {line.method: line for line in section.lines if line.point == "70%"}
    assert section.ratio(by_name["LAMP"], published, "perplexity_wikitext2") == 1.5
    assert section.ratio(by_name[published], published, "perplexity_wikitext2") == 1
    assert section.ratio(by_name["LAMP"], "SparseGPT", "perplexity_wikitext2") is None


def test_ratio_of_what_looks_at_no_data_is_against_all_draws():
    rows = [row("magnitude", "-", 900), row("SparseGPT", "0", 100), row("SparseGPT", "128", 200)]
    section = section_of(rows, "baselines")
    line = next(line for line in section.lines if line.method == "magnitude" and line.rows)
    assert section.ratio(line, "SparseGPT", "perplexity_wikitext2") == 6


def test_frontier_marks_what_no_faster_method_beats():
    rows = [
        *(row("SparseGPT", "0", 300, seconds=10), row("LAMP as published", "0", 310, seconds=20)),
        *(row("LAMP, effort high", "0", 100, seconds=40), row("LAMP", "0", 150, seconds=30)),
        row("ALPS", "0", 1, seconds="-"),
    ]
    found = sections.frontier(section_of(rows).beside, "perplexity_wikitext2")
    assert [(line.method, is_best) for line, is_best in found] == [
        *(("SparseGPT", True), ("LAMP as published", False)),
        *(("LAMP", True), ("LAMP, effort high", True)),
    ]


def test_page_has_the_spread_both_ratios_and_the_processor_time():
    rows = [
        *(row("SparseGPT", draw, 40, "2:4", 5) for draw in ("0", "128")),
        *(row("LAMP as published", draw, value, "2:4", 10) for draw, value in (("0", 10), ("128", 30))),
        *(row("LAMP", draw, value, "2:4", 15) for draw, value in (("0", 5), ("128", 15))),
    ]
    lines = page.markdown(rows)
    end = "| 70.000% | 15 | 1.50 | 1000 |"
    draws = "0, 128 (256 not measured yet)"
    assert f"| 2:4 | LAMP | {draws} | 10.0 (5.0 to 15.0) | 0.50 | 0.25 {end}" in lines


def test_cells_that_were_not_measured_are_shown_as_missing():
    empty = "\n".join(page.markdown([]))
    assert "| 80% | LAMP | not measured yet |" in empty
    for name, part in PARTS.items():
        num_cells = len(STUDY.keys(part))
        command = "python -m benchmarks.quality" + (f" --part {name}" if name != CORE else "")
        assert f"{num_cells} of {num_cells} cells are not measured yet (`{command}`)" in empty
    one = "\n".join(page.markdown([row("SparseGPT", "0", 40)]))
    assert "44 of 45 cells are not measured yet" in one
    assert "| 70% | SparseGPT | 0 (128, 256 not measured yet) | 40.0 |" in one
    assert "| - | dense | not measured yet |" in one


def test_of_another_model_only_the_parts_that_were_measured_are_shown():
    lines = page.markdown([row("SparseGPT", "0", 40), row("LAMP in bf16", "0", 40, model="tiny")])
    titles = [line for line in lines if line.startswith("## ")]
    assert [title for title in titles if ": tiny" in title] == ["## Arithmetic: tiny, wikitext2-valid, 40x256"]
    assert len(titles) == len(PARTS) + 1


def test_the_dense_model_stands_in_every_table_and_a_row_of_no_part_is_told():
    lines = page.markdown([row("dense", "-", 44.49, "-", ""), row("SparseGPT", "0", 9, num_samples="32")])
    assert sum(line.startswith("| - | dense | - | 44.49 |") for line in lines) == len(PARTS) - 1  # all but the tasks
    assert "1 rows of quality.csv belong to no part of the plan and are not shown." in lines


def test_page_tells_a_broken_pattern_and_why_a_method_is_left_out():
    text = "\n".join(page.markdown([row("ALPS", "0", 10, "2:4", pattern_held="0.972000")]))
    assert "ALPS at 2:4 breaks the pattern in 2.80% of its groups" in text
    assert "no Wanda at 2:4+int4: it changes no weight that it keeps" in text


def test_accuracies_stand_in_a_table_of_their_own():
    measured = row("LAMP", "0", 0, evaluated=STUDY.tasks, acc_mean="0.4321", acc_boolq="0.6000")
    del measured["perplexity_wikitext2"]
    lines = page.markdown([row("LAMP", "0", 50), measured])
    assert "| at | method | draws | mean | boolq |" in lines
    assert "| 70% | LAMP | 0 | 43.2% | 60.0% |" in lines
    assert "| 50% | LAMP | not measured yet | - | - |" in lines


def test_the_picture_is_drawn_from_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "quality.png"
    assert not figure.draw([], path)
    assert not path.exists()
    methods_of = (("SparseGPT", 300, 10), ("LAMP", 150, 30))
    rows = [row(name, "0", value, point, cpu) for point in ("50%", "70%") for name, value, cpu in methods_of]
    rows += [
        row("dense", "-", 44, "-", ""),
        row(methods.PLAIN, "0", 80, "2:4"),
        row("LAMP, distilled on 480", "0", 70, "2:4"),
    ]
    panels = figure._panels(rows)
    assert [fill.func.__name__ for fill in panels] == [
        "_by_sparsity",
        "_by_time",
        "_by_time",
        "_by_time",
        "_by_samples",
    ]
    assert figure.draw(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_row_says_which_settings_were_in_force_and_what_the_distillation_reports():
    config = {"method": "lamp", "pruner": "alps", "epochs": 0, "lr": 0.002, "distill": True, "bits": None, "seed": 7}
    calibrate = {"name": "calibrate", "kind": "calibrate", "block": None, "is_tabled": False, "headline": "9 tokens"}
    distill = {"name": "distill", "kind": "distill", "block": None, "is_tabled": False, "headline": "KL 0.6 -> 0.5"}
    evaluate = {"name": "evaluate-1", "kind": "evaluate", "block": None, "is_tabled": True, "headline": "perplexity 9"}
    found = plan.of_status({"config": config, "steps": [calibrate, distill, evaluate]})
    assert found == {
        "resolved": "method=lamp pruner=alps epochs=0 lr=0.002 distill=True",
        "reported": "distill: KL 0.6 -> 0.5",
    }


def test_any_model_folder_is_measured_by_zeros_and_perplexity():
    command = [warm_python.SCRIPT, ROOT / "benchmarks/quality/measure.py", ROOT / "examples/tiny-opt"]
    command += ["--evaluate", "pydocs", "--eval-seqlen", "128", "--eval-max-tokens", "256", "--pattern", "2:4"]
    shown = warm_python.run(*command, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["evaluations"][0] | {"perplexity": 0} == {"source": "pydocs", "perplexity": 0, "num_tokens": 256}
    assert 10 < report["evaluations"][0]["perplexity"] < 200
    assert report["pattern_held"] < 0.01


def cell_of(tmp_path: Path, key: dict, program: str, settings: str = "", **more: object) -> cells.Cell:
    folder = cells.folder_for(key, settings, tmp_path)
    command = (sys.executable, "-c", program)
    return cells.Cell(key, settings, folder, (command,), lambda r: {"p": str(r[0]["p"])}, **more)


def test_a_cell_is_measured_once_and_again_when_its_settings_change(tmp_path):
    key = {"point": "70%", "method": "m"}
    table = cells.Table(tmp_path / "table.csv", tuple(key))
    for settings, value in (("a", 1), ("a", 2), ("b", 3)):
        program = f"print('talk'); print('{json.dumps({'p': value})}')"
        assert cells.run_cells([cell_of(tmp_path, key, program, settings)], table) == []
        assert [r["p"] for r in table.rows()] == ["3" if settings == "b" else "1"]
    assert table.rows()[0]["code"]


def test_a_failed_cell_is_told_and_the_others_run(tmp_path, capsys):
    table = cells.Table(tmp_path / "table.csv", ("name",))
    bad = cell_of(tmp_path, {"name": "bad"}, "exit('why')")
    good = cell_of(tmp_path, {"name": "good"}, "print('{\"p\": 1}')")
    assert cells.run_cells([bad, good], table) == ["bad"]
    assert [r["name"] for r in table.rows()] == ["good"]
    assert "why" in capsys.readouterr().err


def test_a_folder_stays_until_every_row_that_needs_it_is_there(tmp_path):
    table = cells.Table(tmp_path / "table.csv", ("name",))
    program = "print('{\"p\": 1}')"
    first = cell_of(tmp_path, {"name": "first"}, program, resumes=True, kept_for=({"name": "second"},))
    cells.run_cells([first], table)
    assert first.folder.exists()
    second = cells.Cell(
        {"name": "second"}, "", first.folder, first.commands, first.figures, (), True, ({"name": "first"},)
    )
    cells.run_cells([second], table)
    assert not first.folder.exists()


# Half a second of processor time; the first call then waits to be stopped.
WORK = """
import pathlib, sys, time
while time.process_time() < 0.5: pass
began = pathlib.Path(sys.argv[1])
if not began.exists():
    began.touch()
    time.sleep(60)
print("{}")
"""
BENCHMARK = """
import pathlib, sys
from benchmarks.quality import cells
folder = pathlib.Path(sys.argv[1])
command = (sys.executable, str(folder / "work.py"), str(folder / "began"))
figures = lambda reports: {"cpu_seconds": str(reports[0]["cpu_s"])}
cell = cells.Cell({"name": "a"}, "", folder / "work", (command,), figures, (), True)
cells.run_cells([cell], cells.Table(folder / "table.csv", ("name",)))
"""


def test_processor_time_of_a_stopped_cell_is_added_to_that_of_the_next_call(tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    (tmp_path / "work.py").write_text(WORK)
    command = [sys.executable, str(script), str(tmp_path)]
    stopped = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (tmp_path / "began").exists():
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=30) == 128 + signal.SIGTERM
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    (found,) = cells.Table(tmp_path / "table.csv", ("name",)).rows()
    assert float(found["cpu_seconds"]) > 1


def test_processor_time_is_unknown_after_a_call_without_an_account(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.begin(("run",), "abc")
    ledger.end(("run",), 3.0)
    again = Ledger(tmp_path)
    again.begin(("run",), "def")
    assert Ledger(tmp_path).cpu_s(("run",)) is None
    again.end(("run",), 4.0)
    assert (Ledger(tmp_path).cpu_s(("run",)), Ledger(tmp_path).code) == (7.0, "abc to def")


def test_a_table_keeps_the_rows_of_all_parts(tmp_path):
    table = cells.Table(tmp_path / "quality.csv", KEY)
    for each in (row("SparseGPT", "0", 40), row("LAMP", "0", 20)):
        table.put({name: each[name] for name in KEY}, each)
    assert [each["method"] for each in table.rows()] == ["SparseGPT", "LAMP"]
    assert table.path.read_text().splitlines()[0].endswith("settings,resolved,reported,code,software,machine")


@pytest.mark.parametrize("part", [[], ["--part", "all"]])
def test_the_plan_can_be_shown_without_running(tmp_path, part):
    command = [sys.executable, "-m", "benchmarks.quality", "--dry-run", "--calibration", "pydocs", *part]
    command += ["--evaluate", "pydocs", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--method sparsegpt --dtype float32 --pattern 2:4 --bits 4" in shown
    assert "--method wanda --dtype float32 --pattern 2:4 --bits 4" not in shown
    assert ("--effort high" in shown) == bool(part)


def test_a_part_that_does_not_exist_is_refused():
    command = [sys.executable, "-m", "benchmarks.quality", "--dry-run", "--part", "cores"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert refused.returncode == 2
    assert "cores: no such part; there are core, baselines" in refused.stderr
