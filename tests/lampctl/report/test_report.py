"""`lampctl report`: its numbers are those of the commits and of the files, and its page needs nothing but itself."""

import base64
import csv
import io
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lampctl.report import data, plots
from lampctl.report.folder import write_folder
from lampctl.report.page import Section, Texts, page
from pipeline.runs.lifecycle import reopen
from pipeline.runs.status import status
from tests.lampctl.report.reported_run import commits, made

PROMPT = "<b>The quick</b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with made(tmp_path_factory.mktemp("runs")) as found:
        yield found


@pytest.fixture(scope="module")
def state(folder):
    return status(*reopen(folder / "lamp"))


class Found(HTMLParser):
    """What a page refers to, its pictures, and the text of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, text):
        if self._in_cell:
            self.cells[-1] += text


def read(html: str) -> Found:
    found = Found()
    found.feed(html)
    return found


def test_errors_and_curves_are_those_of_the_commits(folder, state):
    done = commits(folder / "lamp")
    errors = data.error_by_block(state)
    assert len(errors.rows) == 2 + 3  # of three blocks the first is not compensated
    for block, training, *losses in errors.rows:
        step = {"compensation": "compensate-block", "refinement": "refine-block"}[training]
        training = done[f"{step}/{block}"]["result"]["training"]
        assert losses == [
            training[when][samples] for samples in ("trained", "held_out") for when in ("before", "after")
        ]
    curves = data.training_curves(state)
    for block in (1, 2):
        training = done[f"compensate-block/{block}"]["result"]["training"]
        part = curves.where("block", block).where("training", "compensation")
        assert part.column("epoch") == [0, 1, 2]
        assert part.column("trained") == [
            training["before"]["trained"],
            *(e["trained"] for e in training["epoch_losses"]),
        ]
        assert part.column("held_out") == [
            training["before"]["held_out"],
            *(e["held_out"] for e in training["epoch_losses"]),
        ]
        assert part.where("is_kept", 1).column("epoch") == [training["kept_epoch"]]
    layers = data.pruning_error_by_layer(state)
    pruned = done["prune-block/2"]["result"]["layers"]
    assert layers.where("block", 2).column("relative_error") == [
        pruned[layer.name]["relative_error"] for layer in state.blocks[2].layers
    ]


def test_the_sparsity_achieved_is_that_of_the_exported_files(folder, state):
    table = data.sparsity_by_layer(state)
    weights = {}
    for path in (folder / "lamp/model").glob("*.safetensors"):
        weights |= load_file(path)
    for block in state.blocks:
        rows = table.where("block", block.block)
        counts = [int((weights[f"{layer.name}.weight"] == 0).sum()) for layer in block.layers]
        others = [layer.num_other_zeros for layer in block.layers]
        found = rows.column("num_found")
        assert found[:-1] == [count - other for count, other in zip(counts, others, strict=True)]
        assert found[-1] == sum(found[:-1])
        assert rows.column("num_budgeted") == found
        assert rows.column("achieved") == [n / size for n, size in zip(found, rows.column("num_weights"), strict=True)]
    assert table.distinct("layer")[-1] == data.WHOLE_BLOCK


def test_steps_and_perplexities_are_those_of_the_commits(folder, state):
    done = commits(folder / "lamp")
    table = data.steps(state)
    assert table.column("step") == list(done)
    assert table.column("elapsed_s") == [commit["elapsed_s"] for commit in done.values()]
    assert table.column("peak_memory_bytes") == [commit["peak_memory_bytes"] for commit in done.values()]
    other = status(*reopen(folder / "lamp-sparsegpt"))
    points = data.measured_by_sparsity([state, other])
    assert sorted(points.column("series")) == ["LAMP", "SparseGPT", "dense"]
    for name, run in (("LAMP", "lamp"), ("SparseGPT", "lamp-sparsegpt")):
        (row,) = points.where("series", name).rows
        figures = next(c["result"] for s, c in commits(folder / run).items() if s.startswith("evaluate/pruned"))
        assert row[-1] == figures["value"]
        assert row[-2] == pytest.approx(0.6, abs=1e-4)
    assert points.where("series", "dense").column("sparsity") == [0.0]


def test_page_embeds_all_figures_and_loads_nothing(lampctl, folder):
    call = ("report", folder / "lamp", "--out", "out", "--prompt", PROMPT, "--text-tokens", 5, "--device", "cpu")
    answer = lampctl(*call)
    assert answer.code == 0, answer.err
    names = {"error", "layers", "sparsity", "training", "steps", "series-0", "series-1"}
    assert {p.name for p in Path("out/figures").iterdir()} == {f"{n}.{kind}" for n in names for kind in ("png", "csv")}
    html = Path("out/index.html").read_text()
    found = read(html)
    assert all(ref.startswith(("data:", "#")) for ref in found.references)
    assert "script" not in found.tags
    embedded = {ref.removeprefix("data:image/png;base64,") for ref in found.references if ref.startswith("data:image")}
    files = {base64.b64encode(path.read_bytes()).decode() for path in Path("out/figures").glob("*.png")}
    assert embedded == files
    state = lampctl("status", folder / "lamp", "--json").json
    for result in state["evaluations"]:
        assert f"{result['perplexity']:,.2f}" in " ".join(found.cells)
    assert f"{100 * state['sparsity']:.4f}%" in found.cells
    # A second time into the same folder, without a run of the models, and the figures are the same bytes.
    again = lampctl("report", folder / "lamp", "--out", "out", "--no-text")
    assert again.code == 0, again.err
    assert {base64.b64encode(path.read_bytes()).decode() for path in Path("out/figures").glob("*.png")} == files
    assert "What the models write" in html
    assert "What the models write" not in Path("out/index.html").read_text()


def test_report_writes_each_figures_numbers_as_csv(lampctl, folder, state):
    assert lampctl("report", folder / "lamp", "--out", "out", "--no-text").code == 0
    rows = list(csv.DictReader(io.StringIO(Path("out/figures/error.csv").read_text())))
    table = data.error_by_block(state)
    assert [float(row["after_held_out"]) for row in rows] == table.numbers("after_held_out")
    assert [row["training"] for row in rows] == table.column("training")


def test_report_text_is_greedy_decoding_and_escaped(lampctl, folder):
    call = ("report", folder / "lamp", "--out", "out", "--prompt", PROMPT, "--text-tokens", 6, "--device", "cpu")
    assert lampctl(*call).code == 0
    found = read(Path("out/index.html").read_text())
    assert "b" not in found.tags
    for place in (folder / "m", folder / "lamp/model"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                best = model(ids).logits[0, -1].argmax()
            if best == model.config.eos_token_id:
                break
            ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
        expected = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert any(cell.split() == expected.split() for cell in found.cells), expected


def test_report_of_several_runs_is_one_page(lampctl, folder):
    answer = lampctl("report", folder / "lamp", folder / "lamp-sparsegpt", "--out", "out", "--no-text")
    assert answer.code == 0, answer.err
    names = {path.stem for path in Path("out/figures").glob("*.png")}
    assert {"measured", "lamp-error", "lamp-steps", "lamp-sparsegpt-layers", "lamp-sparsegpt-steps"} <= names
    assert "lamp-sparsegpt-error" not in names  # nothing was trained
    html = Path("out/index.html").read_text()
    assert '<tr class="marked"><td>method</td><td>lamp</td><td>sparsegpt</td></tr>' in html
    assert "<tr><td>sparsity</td><td>0.6</td><td>0.6</td></tr>" in html


def test_report_of_a_run_without_steps(lampctl, folder):
    words = f"text:{folder}/words.txt"
    flags = ("--calibration", words, "--num-samples", 4, "--seqlen", 32, "--evaluate", words, "--device", "cpu")
    assert lampctl("init", folder / "m", "--sparsity", 0.5, *flags, "--run-dir", "r").code == 0
    answer = lampctl("report", "r", "--out", "out")
    assert answer.code == 0, answer.err
    assert {path.stem for path in Path("out/figures").iterdir()} == {"sparsity"}
    assert "next: calibrate" in Path("out/index.html").read_text()


def test_report_refuses_a_folder_with_other_files(lampctl, folder, tmp_path):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear reader")
    for place, message in (
        ("mine", "holds files that are not a report"),
        ("mine/letter.txt", "is a file"),
        (folder / "lamp/report", "is inside the run"),
    ):
        answer = lampctl("report", folder / "lamp", "--out", place, "--no-text")
        assert answer.code == 2
        assert message in answer.err
    assert [path.name for path in Path("mine").iterdir()] == ["letter.txt"]
    assert not (folder / "lamp/report").exists()


def test_report_without_matplotlib_names_the_extra(lampctl, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = lampctl("report", folder / "lamp", "--out", "out", "--no-text")
    assert answer.code == 2
    assert "pip install '.[report]' in the clone of lampctl" in answer.err
    assert not Path("out").exists()


def test_a_report_over_an_older_one_leaves_only_its_own_files_and_those_of_others(lampctl, folder):
    both = lampctl("report", folder / "lamp", folder / "lamp-sparsegpt", "--out", "out", "--no-text")
    assert both.code == 0, both.err
    of_both = {str(path) for path in Path("out").rglob("*.*")}
    (Path("out") / "figures" / "mine.png").write_bytes(b"a figure of the user")
    (Path("out") / "notes.csv").write_text("a table of the user")
    alone = lampctl("report", folder / "lamp-sparsegpt", "--out", "out", "--no-text")
    assert alone.code == 0, alone.err
    fresh = lampctl("report", folder / "lamp-sparsegpt", "--out", "fresh", "--no-text")
    assert fresh.code == 0, fresh.err
    expected = {str(path.relative_to("fresh")) for path in Path("fresh").rglob("*.*")}
    left = {str(path.relative_to("out")) for path in Path("out").rglob("*.*")}
    assert left == {*expected, "figures/mine.png", "notes.csv"}
    assert len(of_both) > len(expected)


def test_an_edited_page_deletes_nothing_outside_of_the_report(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    named = ("../outside.png", str(outside), "figures/../../outside.png", "thesis.tex")
    (tmp_path / "out" / "index.html").write_text(page("t", "s", [], "f", named))
    write_folder(tmp_path / "out", {}, lambda files: page("t", "s", [], "f", files))
    assert outside.exists()
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_report_without_the_original_model_needs_no_text(lampctl, folder):
    (folder / "m").rename(folder / "away")
    try:
        answer = lampctl("report", folder / "lamp", "--out", "out")
        assert answer.code == 5
        assert "--no-text" in answer.err
        assert not Path("out").exists()
        assert lampctl("report", folder / "lamp", "--out", "out", "--no-text").code == 0
    finally:
        (folder / "away").rename(folder / "m")


def test_plots_draw_infinite_zero_and_missing_values(state):
    """An infinite perplexity, an error of zero, a name with signs of its own, one block, no memory known."""
    columns = ("model", "metric", "data", "amount", "series", "run", "sparsity", "value")
    rows = (
        ("a$b_{", "perplexity", "c$ @64", 640, "dense", None, 0.0, None),
        ("a$b_{", "perplexity", "c$ @64", 640, "LAMP", "r", 0.5, None),
        ("a$b_{", "perplexity", "c$ @64", 640, "LAMP", "r", 0.7, 12.0),
        ("d", "perplexity", "e @64", 640, "dense", None, 0.0, 9.0),
    )
    drawn = [plots.measured_by_sparsity(data.Dataset(columns, rows))]
    zero = data.Dataset(("block", "layer", "relative_error"), ((0, "q", 0.0),))
    drawn.append(plots.pruning_error_by_layer(zero))
    one = data.Dataset(
        ("block", "training", "epoch", "trained", "held_out", "is_kept"), ((0, "refinement", 0, 1.0, None, 1),)
    )
    drawn.append(plots.training_curves(one))
    unknown = data.steps(state)
    without = tuple((*row[:5], None, None) for row in unknown.rows)
    drawn.append(plots.steps(data.Dataset(unknown.columns, without)))
    assert all(png.startswith(b"\x89PNG") for png in drawn)


def test_no_two_ticks_of_a_picture_have_one_name(monkeypatch):
    """Also where all sparsities are the same, and the axis is a hundredth long."""
    from matplotlib.figure import Figure

    def ticks(draw, height):
        figure = Figure(figsize=(8, height), layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        bar, first = figure.axes[-1], figure.axes[0]
        axis = bar.yaxis if bar is not first else first.xaxis
        return [text.get_text() for text in axis.get_ticklabels()]

    monkeypatch.setattr(plots, "png", ticks)
    columns = ("block", "layer", "num_weights", "num_budgeted", "num_found", "budget", "achieved")
    uniform = data.Dataset(columns, tuple((0, name, 10, 7, 7, 0.7, 0.7) for name in ("q", data.WHOLE_BLOCK)))
    runs = ("model", "metric", "data", "amount", "series", "run", "sparsity", "value")
    same = data.Dataset(runs, tuple(("m", "perplexity", "d", 640, name, name, 0.7, 9.0) for name in ("LAMP", "Wanda")))
    for named in (plots.sparsity_by_layer(uniform), plots.measured_by_sparsity(same)):
        assert len(named) > 2
        assert len(set(named)) == len(named)
        assert all(name.endswith("%") for name in named)


def test_report_refuses_prompt_with_no_text(lampctl, folder):
    answer = lampctl("report", folder / "lamp", "--out", "out", "--no-text", "--prompt", "Once")
    assert answer.code == 2
    assert "--no-text" in answer.err


def test_page_escapes_titles_prompts_and_texts():
    evil = '</td><script>alert("x")</script>'
    sections = [Section('a"b', evil, (Texts((evil,), ((evil, (evil,)),)),))]
    html = page(evil, evil, sections, evil)
    assert "<script" not in html
    assert 'id="a"b"' not in html


def test_a_further_training_of_blocks_is_drawn_in_the_order_of_the_run():
    columns = ("block", "training", "before", "after", "before_held_out", "after_held_out")
    rows = (
        (0, "refinement", 2.0, 1.0, None, None),  # block 0 has one training only: it does not say the order
        (1, "compensation", 4.0, 3.0, None, None),
        (1, "refinement", 3.5, 2.0, None, None),
        (1, "distillation", 2.0, 1.5, None, None),
    )
    table = data.Dataset(columns, rows)
    names = plots._trainings(table)
    assert names == ["compensation", "refinement", "distillation"]
    shifts = plots._shifts(names)
    assert [round(shifts[name], 3) for name in names] == [-0.233, 0.0, 0.233]
    assert plots.error_by_block(table, relative=False).startswith(b"\x89PNG")
