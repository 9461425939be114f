"""`lampctl run` from the user's side, on a small OPT that has learnt something."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import PRUNING_ALONE, TINY_OPT
from tests.small_models import save

LEARNT = (
    "--calibration",
    "pydocs",
    "--num-samples",
    "16",
    "--seqlen",
    "128",
    "--evaluate",
    "pydocs",
    "--device",
    "cpu",
)
WHOLE = (
    *("--calibration", "text:words.txt", "--num-samples", "4", "--seqlen", "64"),
    *("--evaluate", "text:words.txt", "--device", "cpu"),
)
DATA = (*WHOLE, *PRUNING_ALONE)


@pytest.fixture(autouse=True)
def _words(words):
    """The file that DATA names."""


def masked_counts(run: Path) -> dict[str, int]:
    return {
        layer["name"]: layer["num_masked"]
        for block in json.loads((run / "run.json").read_text())["budget"]
        for layer in block["layers"]
    }


def own_perplexity(folder: Path, seqlen: int, max_tokens: int) -> float:
    """Perplexity by transformers' own loss, on the whole model at once."""
    from stages.data.registry import parse_source

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(parse_source("pydocs").text("evaluation"))["input_ids"])
    pieces = ids[:max_tokens].split(seqlen)
    losses = []
    for piece in pieces:
        if len(piece) == seqlen:
            with torch.no_grad():
                losses.append(model(piece[None], labels=piece[None]).loss.double())
    return torch.stack(losses).mean().exp().item()


def test_lamp_beats_sparsegpt_and_sparsegpt_magnitude_on_a_trained_model(lampctl):
    answer = lampctl(
        *("run", TINY_OPT, "--sparsity", "0.7", *LEARNT, "--eval-max-tokens", "4096", "--run-dir", "r"),
        *("--baseline", "sparsegpt", "--baseline", "wanda", "--baseline", "magnitude", "--json"),
        *("--refine-epochs", "2", "--distill-generated", "0", "--distill-epochs", "1"),
    )
    assert answer.code == 0, answer.err
    report = answer.json
    found = {e["which"]: e["perplexity"] for e in report["evaluations"]}
    pruned = {r["method"]: r["evaluations"][0]["perplexity"] for r in (report, *report["baselines"])}
    assert found["dense"] < pruned["lamp"] < pruned["sparsegpt"] < pruned["magnitude"]
    assert pruned["sparsegpt"] < pruned["wanda"]
    # By a margin that noise does not bridge.
    assert pruned["lamp"] < 0.96 * pruned["sparsegpt"]
    # The figures are those of the files, by another way to compute them.
    assert own_perplexity(TINY_OPT, 128, 4096) == pytest.approx(found["dense"], rel=1e-5)
    assert own_perplexity(Path("r/model"), 128, 4096) == pytest.approx(pruned["lamp"], rel=1e-5)
    assert own_perplexity(Path("r-wanda/model"), 128, 4096) == pytest.approx(pruned["wanda"], rel=1e-5)
    # All share one calibration set.
    sets = {(Path(name) / "commits" / "000000.json").read_text() for name in ("r", "r-sparsegpt", "r-wanda")}
    digests = {json.dumps([f["sha256"] for f in json.loads(s)["payloads"]["calibration"]["files"]]) for s in sets}
    assert len(digests) == 1


@pytest.mark.parametrize("family", ["opt-350m", "llama-gqa", "gpt2", "bloom", "falcon"])
def test_the_export_opens_and_holds_the_budget_to_the_last_weight(family, lampctl, tmp_path):
    original = save(tmp_path / family, family, dtype=torch.float16)
    answer = lampctl("run", original, "--sparsity", "0.55", *DATA, "--num-samples", "3", "--run-dir", "r", "--json")
    assert answer.code == 0, answer.err
    before = load_file(original / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained("r/model", dtype="auto")
    assert model.dtype == torch.float16
    assert (
        AutoTokenizer.from_pretrained("r/model")("abc")["input_ids"]
        == AutoTokenizer.from_pretrained(original)("abc")["input_ids"]
    )
    after = {}
    for path in Path("r/model").glob("*.safetensors"):
        after.update(load_file(path))
    assert after.keys() == before.keys()
    assert all(after[key].dtype == before[key].dtype and after[key].shape == before[key].shape for key in before)
    modules = dict(model.named_modules())
    counts = masked_counts(Path("r"))
    zeros = {name: int((modules[name].weight == 0).sum()) for name in counts}
    natural = answer.json["num_other_zeros"]
    assert all(zeros[name] >= counts[name] for name in counts)
    assert sum(zeros.values()) == sum(counts.values()) + natural
    total = sum(modules[name].weight.numel() for name in counts)
    assert sum(counts.values()) == round(0.55 * total) == answer.json["num_masked"]
    # What lies outside the blocks is as it was, to the bit.
    block_keys = {key for key in before if ".0." in key or ".1." in key or ".2." in key}
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - block_keys)
    assert block_keys


def test_no_warning_about_missing_or_unexpected_weights(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama-gqa")
    assert (
        lampctl("run", original, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir", "r").code
        == 0
    )
    _, info = AutoModelForCausalLM.from_pretrained("r/model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_second_run_of_the_same_command_does_nothing_and_other_settings_are_refused(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, *DATA, "--num-samples", "3", "--method", "wanda", "--eval-max-tokens", "512")
    first = lampctl(*call, "--sparsity", "0.5")
    assert first.code == 0, first.err
    run = Path("runs/m-s50-wanda")
    commits = sorted((run / "commits").iterdir())
    again = lampctl(*call, "--sparsity", "0.5")
    assert again.code == 0
    assert again.out == first.out
    assert sorted((run / "commits").iterdir()) == commits
    before = (run / "run.json").read_bytes()
    other = lampctl(*call, "--sparsity", "0.6", "--seed", "3", "--run-dir", run)
    assert other.code == 3
    assert "sparsity: 0.5 there, 0.6 asked for" in other.err
    assert "seed: 0 there, 3 asked for" in other.err
    assert (run / "run.json").read_bytes() == before
    # What does not change the weights may change: one more evaluation, and nothing else is done again.
    more = lampctl(*call, "--sparsity", "0.5", "--eval-seqlen", "32")
    assert more.code == 0, more.err
    assert len(list((run / "commits").iterdir())) == len(commits) + 2


def test_a_changed_model_is_another_run(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "")
    assert lampctl(*call).code == 0
    save(tmp_path / "m", "llama", seed=1)
    answer = lampctl(*call)
    assert answer.code == 3
    assert "model files" in answer.err


def test_steps_one_by_one_give_the_weights_of_run_and_refuse_to_be_done_out_of_order(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama-gqa")
    settings = (original, "--sparsity", "0.5", *WHOLE, "--epochs", "1", "--eval-max-tokens", "512")
    assert lampctl("run", *settings, "--run-dir", "whole").code == 0
    begun = lampctl("init", *settings, "--run-dir", "steps")
    assert begun.code == 0, begun.err
    assert "lampctl calibrate steps" in begun.out
    assert not Path("steps/commits").exists()

    for early in (("capture",), ("prune-block",), ("prune-block", "--block", "1"), ("export",), ("evaluate",)):
        refused = lampctl(early[0], "steps", *early[1:])
        assert refused.code == 2, early
        assert re.search(r"call lampctl calibrate \S*steps first", refused.err)
    order = [
        "calibrate",
        "capture",
        "prune-block 0",
        "refine-block 0",
        "compensate-block 1",
        "prune-block 1",
        "refine-block",
        "compensate-block",
        "prune-block 2",
        "refine-block",
    ]
    for step in (*order, "generate", "distill", "export", "evaluate"):
        name, _, block = step.partition(" ")
        answer = lampctl(name, "steps", *(("--block", block) if block else ()))
        assert answer.code == 0, (step, answer.err)
    assert "already done" in lampctl("prune-block", "steps", "--block", "1").err
    assert "--block 7: the run has no such step" in lampctl("prune-block", "steps", "--block", "7").err
    shards = sorted(p.name for p in Path("whole/model").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert Path("steps/model", shard).read_bytes() == Path("whole/model", shard).read_bytes()


def test_status_shows_steps_budget_losses_and_the_next_step(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    lampctl("init", original, "--sparsity", "0.5", *WHOLE, "--num-samples", "3", "--epochs", "1", "--run-dir", "r")
    for step in ("calibrate", "capture", "prune-block", "refine-block", "compensate-block", "prune-block"):
        assert lampctl(step, "r").code == 0
    state = lampctl("status", "r", "--json").json
    assert state["next_step"] == "refine-block/1"
    assert [b["state"] for b in state["blocks"]] == ["refined", "pruned", "waiting"]
    (refinement,), (compensation,), nothing = (block["trainings"] for block in state["blocks"])
    assert (refinement["name"], compensation["name"], nothing) == ("refinement", "compensation", [])
    assert refinement["after"]["held_out"] <= refinement["before"]["held_out"]
    assert compensation["after"]["held_out"] <= compensation["before"]["held_out"]
    assert state["remaining_s"] > 0
    assert state["remaining_until"] == "generate"
    assert sum(layer["num_masked"] for b in state["blocks"] for layer in b["layers"]) == round(
        0.5 * sum(layer["size"] for b in state["blocks"] for layer in b["layers"])
    )
    shown = lampctl("status", "r", "--settings")
    assert re.search(r"next: refine-block/1; about .* until generate", shown.out)
    assert "down_proj" in shown.out
    assert "preset" not in shown.out
    assert lampctl("resume", "r").code == 0
    assert "finished" in lampctl("status", "r").out


def test_a_run_time_shorter_than_the_start_finishes_the_run_in_many_calls(lampctl, tmp_path):
    save(tmp_path / "m")
    flags = ("--method", "magnitude", "--sparsity", 0.5, "--evaluate", "", "--device", "cpu", "--run-dir", "r")
    commits = tmp_path / "r" / "commits"
    for call in range(8):
        answer = lampctl("run", "m", *flags, "--max-runtime", "0.001s")
        if answer.code == 0:
            break
        assert answer.code == 75, answer.err
        assert "allowed run time of 0.001s is over" in answer.err
        assert len(list(commits.iterdir())) > call
    assert answer.code == 0
    assert call > 1


def test_a_layer_with_a_sparsity_of_its_own_counts_in_every_headline(lampctl, tmp_path):
    save(tmp_path / "m", "opt")
    (tmp_path / "c.yaml").write_text("layer_sparsity: {'.*fc1': 0.5}\n")
    flags = ("--method", "magnitude", "--sparsity", 0.7, "--config", "c.yaml", "--evaluate", "", "--device", "cpu")
    done = lampctl("run", "m", *flags, "--run-dir", "r")
    assert done.code == 0, done.err
    share = lampctl("status", "r", "--json").json["sparsity"]
    assert 0.5 < share < 0.69
    shown = f"{round(100 * share, 2):g}%"
    card = (tmp_path / "r" / "model" / "README.md").read_text()
    for text in (done.err, done.out, lampctl("status", "r").out, lampctl("compare", "r").out, card):
        assert f" {shown}" in text
        assert " 70%" not in text


def test_resume_without_an_argument_takes_the_newest_unfinished_run(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    common = (original, "--method", "magnitude", "--evaluate", "")
    for sparsity in ("0.4", "0.5"):
        assert lampctl("init", *common, "--sparsity", sparsity).code == 0
    assert lampctl("run", *common, "--sparsity", "0.6").code == 0
    assert lampctl("resume").code == 0
    assert Path("runs/m-s50-magnitude/model").is_dir()
    assert not Path("runs/m-s40-magnitude/model").exists()
    assert lampctl("resume").code == 0
    nothing = lampctl("resume")
    assert nothing.code == 0
    assert "nothing left to do: every run under runs/ is finished" in nothing.err


def test_ignored_layers_stay_dense_and_do_not_count(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir", "r")
    assert lampctl(*call, "--ignore", r"layers\.0\.", "--ignore", "down_proj").code == 0
    model = AutoModelForCausalLM.from_pretrained("r/model")
    plain = AutoModelForCausalLM.from_pretrained(original)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.model.layers[2].mlp.down_proj.weight, plain.model.layers[2].mlp.down_proj.weight)
    assert (model.model.layers[1].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_model_card_lists_settings_and_metrics(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    answer = lampctl("run", original, "--sparsity", "0.5", *DATA, "--method", "wanda", "--run-dir", "r", "--json")
    card = Path("r/model/README.md").read_text()
    for result in answer.json["evaluations"]:
        assert f"{result['perplexity']:,.2f}" in card
    assert "50.0000%" in card
    assert "- num_samples: 4" in card


def test_metrics_of_other_evaluation_settings_are_measured_again(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    assert lampctl("run", original, "--sparsity", "0.5", *DATA, "--eval-max-tokens", "512", "--run-dir", "r").code == 0

    def evaluate(max_tokens):
        answer = lampctl("evaluate", "r", "--eval-max-tokens", max_tokens, "--json")
        assert answer.code == 0, answer.err
        return {e["which"]: (e["num_tokens"], e["perplexity"]) for e in answer.json["evaluations"]}

    first, other = evaluate(512), evaluate(1024)
    assert [n for n, _ in first.values()] == [512, 512]
    assert [n for n, _ in other.values()] == [1024, 1024]
    assert evaluate(512) == first
    card = Path("r/model/README.md").read_text()
    for tokens, figures in ((512, first), (1024, other)):
        dense, pruned = figures["dense"][1], figures["pruned"][1]
        assert f"| {dense:,.2f} | {pruned:,.2f} | 64 tokens a window, partial: first {tokens} tokens |" in card
    # A pruned figure without a dense one gets a row of its own.
    more = lampctl(
        *("run", original, "--sparsity", "0.5", *DATA, "--eval-max-tokens", "256", "--run-dir", "r"),
        "--no-evaluate-dense",
    )
    assert more.code == 0
    row = next(line for line in Path("r/model/README.md").read_text().splitlines() if "first 256 tokens" in line)
    assert row.split("|")[2].strip() == "-"


def test_evaluate_of_an_unfinished_run_prunes_nothing(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    assert lampctl("init", original, "--sparsity", "0.5", *DATA, "--run-dir", "r").code == 0
    refused = lampctl("evaluate", "r", "--evaluate", "")
    assert refused.code == 2
    assert re.search(r"call lampctl calibrate \S+ first", refused.err)
    assert not Path("r/commits").exists()


def test_changed_calibration_text_is_refused(lampctl, tmp_path, words):
    original = save(tmp_path / "m", "llama")
    begin = ("init", original, "--sparsity", "0.5", *DATA, "--method", "wanda")
    assert lampctl(*begin, "--run-dir", "r").code == 0
    text = words.read_text()
    words.write_text(text.upper())
    refused = lampctl("resume", "r")
    assert refused.code == 3
    assert "has changed since this run began" in refused.err
    words.write_text(text)
    assert lampctl("resume", "r").code == 0
    words.write_text(text.upper())
    again = lampctl("evaluate", "r", "--evaluate", "text:words.txt")
    assert again.code == 3
    assert "give the new data another name" in again.err


def test_damaged_weights_are_rebuilt_before_evaluation(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", *DATA, "--method", "wanda", "--run-dir", "r")
    assert lampctl(*call).code == 0
    shard = Path("r/model/model-00002-of-00004.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-64] + bytes(64))
    answer = lampctl("evaluate", "r", "--eval-seqlen", "32")
    assert answer.code == 0, answer.err
    assert "model-00002-of-00004.safetensors is not what was committed" in answer.err
    assert shard.read_bytes() == data


def test_missing_file_of_the_model_folder_is_restored(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", *DATA, "--method", "wanda", "--run-dir", "r")
    assert lampctl(*call).code == 0
    before = {p: p.read_bytes() for p in Path("r/model").rglob("*") if p.is_file()}
    assert Path("r/model/masks/block-00001.safetensors") in before
    Path("r/model/model-00002-of-00004.safetensors").unlink()
    Path("r/model/config.json").unlink()
    assert lampctl(*call).code == 0
    assert {p: p.read_bytes() for p in Path("r/model").rglob("*") if p.is_file()} == before


def test_baseline_uses_the_preset_and_is_beside_the_run(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", "--preset", "quick", *DATA)
    assert lampctl(*call, "--method", "sparsegpt", "--baseline", "lamp", "--run-dir", "r").code == 0
    assert json.loads(Path("r-lamp/run.json").read_text())["config"]["effort"] == "low"
    assert lampctl(*call, "--run-dir", "r-lamp").code == 0
    Path("here").mkdir()
    monkey = Path.cwd()
    import os

    os.chdir("here")
    try:
        answer = lampctl(
            "run",
            original,
            "--sparsity",
            "0.5",
            "--method",
            "magnitude",
            "--evaluate",
            "",
            "--run-dir",
            ".",
            "--baseline",
            "wanda",
            "--calibration",
            f"text:{monkey}/words.txt",
            "--num-samples",
            "2",
            "--seqlen",
            "32",
        )
    finally:
        os.chdir(monkey)
    assert answer.code == 0, answer.err
    assert Path("here-wanda/model").is_dir()


def test_brackets_in_paths_are_shown_as_they_are(lampctl, tmp_path):
    original = save(tmp_path / "m[bold]x", "llama")
    answer = lampctl("run", original, "--sparsity", "0.5", *DATA, "--method", "wanda", "--run-dir", "br[/x]y")
    assert answer.code == 0, answer.err
    assert "br[/x]y/model" in answer.out
    assert "m[bold]x" in answer.out
    assert lampctl("status", "br[/x]y", "--settings").code == 0


@pytest.mark.parametrize(
    ("flags", "family"),
    [
        (("--pattern", "2:4"), "llama-gqa"),
        (("--pattern", "2:4", "--bits", "4", "--epochs", "1"), "gpt2"),
        (("--sparsity", "0.6", "--bits", "3", "--group-size", "16", "--method", "sparsegpt"), "opt"),
        (("--pattern", "4:8", "--method", "wanda"), "opt-350m"),
        (("--sparsity", "0.5", "--bits", "4", "--method", "magnitude"), "falcon"),
        (("--pattern", "1:4", "--method", "alps", "--export-dtype", "bfloat16"), "llama"),
    ],
)
def test_patterns_and_bits_hold_in_the_exported_model(lampctl, tmp_path, flags, family):
    original = save(tmp_path / "m", family)
    answer = lampctl("run", original, *flags, *DATA, "--eval-max-tokens", "64", "--run-dir", "r", "--json")
    assert answer.code == 0, answer.err
    config = answer.json["config"]
    n, m = map(int, (config["pattern"] or "0:1").split(":"))
    model = AutoModelForCausalLM.from_pretrained("r/model", dtype="auto")
    plain = AutoModelForCausalLM.from_pretrained(original)
    pruned = {layer: count for layer, count in masked_counts(Path("r")).items() if count}
    assert len(pruned) >= 3 * 4
    for name, count in pruned.items():
        module = model.get_submodule(name)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        assert (weight == 0).sum() >= count
        if n:
            assert ((weight == 0).reshape(-1, m).sum(1) >= n).all()
            assert count == weight.numel() * n // m
        if config["bits"]:
            size = config["group_size"] or weight.shape[1]
            assert all(len(part.unique()) <= 2 ** config["bits"] for row in weight for part in row.split(size))
        if config["export_dtype"] == "bfloat16":
            assert weight.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight.to(model.dtype))
    goal = {"2:4": "2:4", "4:8": "4:8", "1:4": "1:4"}.get(config["pattern"] or "", "%")
    heading = next(line for line in Path("r/model/README.md").read_text().splitlines() if line.startswith("# "))
    assert goal in heading


def test_a_pattern_that_does_not_fit_a_layer_is_refused_and_ignoring_it_helps(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--method", "magnitude", "--evaluate", "", "--run-dir", "r", "--pattern", "3:6")
    refused = lampctl(*call)
    assert refused.code == 2
    assert "q_proj has 32 columns, no multiple of 6" in refused.err
    assert not Path("r").exists()
    assert "no multiple" in lampctl(*call, "--ignore", "q_proj$").err


def test_wanda_with_bits_is_refused_as_a_baseline_too(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", "--bits", "4", *DATA, "--run-dir", "r")
    for flags, remedy in ((("--method", "wanda"), "use --method lamp"), (("--baseline", "wanda"), "leave out --base")):
        refused = lampctl(*call, *flags)
        assert refused.code == 2
        assert "Wanda" in refused.err
        assert remedy in refused.err
        assert not Path("r").exists()


def test_a_group_wider_than_every_layer_is_refused(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    refused = lampctl("run", original, "--sparsity", "0.5", "--bits", "4", "--group-size", "4096", *DATA)
    assert refused.code == 2
    assert "--group-size 4096: no layer has more than 64 columns" in refused.err


def test_setting_used_only_by_the_baseline_is_accepted(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    call = ("run", original, "--sparsity", "0.5", *DATA, "--method", "magnitude", "--epochs", "1", "--evaluate", "")
    alone = lampctl(*call, "--run-dir", "a")
    assert "--epochs has no effect" in alone.err
    assert "--num-samples has no effect" in alone.err
    both = lampctl(*call, "--run-dir", "b", "--baseline", "lamp")
    assert both.code == 0, both.err
    assert "no effect" not in both.err


def test_a_budget_from_the_data_is_a_step_that_commits_its_table(lampctl, tmp_path):
    flags = ("--sparsity", "0.6", *LEARNT, "--num-samples", "4", "--eval-max-tokens", "256", "--method", "sparsegpt")
    answer = lampctl(
        "run", TINY_OPT, *flags, "--budget", "outliers", "--budget-spread", "0.1", "--run-dir", "r", "--json"
    )
    assert answer.code == 0, answer.err
    commits = [json.loads(path.read_text()) for path in sorted(Path("r/commits").iterdir())]
    assert [c["step"] for c in commits[:4]] == ["calibrate", "capture", "allocate", "prune-block/0"]
    table, shares = commits[2]["result"]["budget"], commits[2]["result"]["outlier_shares"]
    sparsities = [sum(x["num_masked"] for x in b["layers"]) / sum(x["size"] for x in b["layers"]) for b in table]
    assert max(sparsities) - min(sparsities) == pytest.approx(0.2, abs=1e-3)
    assert sparsities.index(min(sparsities)) == shares.index(max(shares))
    state = lampctl("status", "r", "--json").json
    assert state["num_masked"] == round(0.6 * state["num_prunable"])
    model = AutoModelForCausalLM.from_pretrained("r/model")
    for block, expected in zip(state["blocks"], table, strict=True):
        for layer, wanted in zip(block["layers"], expected["layers"], strict=True):
            assert layer["num_masked"] == wanted["num_masked"]
            assert (model.get_submodule(layer["name"]).weight == 0).sum() >= wanted["num_masked"]


def test_moved_model_folder_is_rebuilt(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    assert lampctl("run", original, "--sparsity", "0.5", *DATA, "--method", "wanda", "--run-dir", "r").code == 0
    before = {p.relative_to("r/model"): p.read_bytes() for p in Path("r/model").rglob("*") if p.is_file()}
    Path("r/model").rename(tmp_path / "elsewhere")
    answer = lampctl("export", "r")
    assert answer.code == 0, answer.err
    assert "The pruned model: r/model" in answer.out
    assert {p.relative_to("r/model"): p.read_bytes() for p in Path("r/model").rglob("*") if p.is_file()} == before
    assert lampctl("export", "r").code == 2  # it is there now


def test_departure_from_the_paper_is_reported(lampctl, tmp_path):
    original = save(tmp_path / "m", "llama")
    flags = ("--sparsity", "0.5", *DATA, "--preset", "paper")
    assert "departs" not in lampctl("init", original, *flags, "--run-dir", "r").out
    answer = lampctl("init", original, *flags, "--refine", "--pruner", "alps", "--run-dir", "r2")
    assert "--pruner, --refine: this departs from the paper's settings" in answer.out


def test_defaults_of_a_newer_version_do_not_stop_a_run_but_given_values_do(lampctl, tmp_path, words, monkeypatch):
    from stages.training import presets

    model = save(tmp_path / "m", "llama")
    flags = ("--sparsity", 0.5, "--num-samples", 2, "--seqlen", 16, "--evaluate", "", "--pruner", "sparsegpt")
    call = ("run", model, *flags, "--calibration", f"text:{words}", "--run-dir", "r")
    assert lampctl("init", *call[1:]).code == 0
    began = json.loads(Path("r/run.json").read_text())["config"]
    monkeypatch.setattr(presets, "_RATES", ((1.0, 0.125),))
    efforts = dict.fromkeys(presets.EFFORTS, presets.Effort(2, 2, 2))
    monkeypatch.setattr(presets, "EFFORTS", efforts)
    refused = lampctl(*call, "--lr", 0.125)
    assert refused.code == 3
    assert "lr: " in refused.err
    assert "epochs" not in refused.err
    assert lampctl(*call).code == 0
    assert json.loads(lampctl("status", "r", "--json").out)["config"]["lr"] == began["lr"] != 0.125
    assert lampctl(*call, "--lr", began["lr"]).code == 0
