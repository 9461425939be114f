"""`lampctl evaluate` on models that belong to no run, and zero-shot tasks in runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import TINY_OPT
from tests.small_models import save, tokenizer
from tests.task_rows import write_rows

MAGNITUDE = ("--method", "magnitude", "--sparsity", "0.5", "--evaluate", "", "--device", "cpu", "--run-dir", "r")


def plain_perplexity(folder, text, seqlen, max_tokens=None):
    """A plain loop over the whole model."""
    ids = torch.tensor(tokenizer()(text)["input_ids"])[:max_tokens]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:]).item()
            for window in ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
        ]
    return math.exp(sum(losses) / len(losses))


def test_evaluate_equals_a_plain_loop_over_windows(lampctl, tmp_path, words):
    folder = save(tmp_path / "m", "llama-gqa")
    (tmp_path / "wiki.raw").write_text(" \n = A = \n \n Some words here . \n" * 40)
    answer = lampctl("evaluate", "m", "--data", "text:words.txt,wikitext2:wiki.raw", "--seqlen", 64, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["source"] == "folder"
    text, wiki = answer.json["measured"]
    assert text["perplexity"] == pytest.approx(plain_perplexity(folder, words.read_text(), 64), rel=1e-4)
    joined = "\n\n".join(["", " = A = \n", "", " Some words here . \n"] * 40)
    assert wiki["perplexity"] == pytest.approx(plain_perplexity(folder, joined, 64), rel=1e-4)
    assert not text["is_partial"]
    assert not wiki["is_partial"]
    assert answer.json["accuracies"] == []


def test_evaluate_of_fewer_tokens_is_marked_as_partial(lampctl, tmp_path, words):
    save(tmp_path / "m", "llama")
    flags = ("--data", "text:words.txt", "--seqlen", 32, "--max-tokens", 128)
    answer = lampctl("evaluate", "m", *flags, "--json")
    assert answer.json["measured"][0]["is_partial"]
    assert answer.json["measured"][0]["perplexity"] == pytest.approx(
        plain_perplexity("m", words.read_text(), 32, 128), rel=1e-4
    )
    assert "partial: first 128 tokens" in lampctl("evaluate", "m", *flags).out


def test_conversations_without_messages_are_counted_in_the_output(lampctl, tmp_path):
    save(tmp_path / "m", "llama")
    rows = [{"messages": []}, {"messages": [{"role": "user", "content": "word " * 200}]}, {"messages": []}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--chat-template", "none", "--seqlen", 32)
    measured = lampctl("evaluate", "m", "--data", "jsonl:chat.jsonl", *flags)
    assert measured.code == 0, measured.err
    counted = "2 conversations without messages"
    assert f"chat.jsonl: passed over {counted}" in " ".join(measured.err.split())
    wanda = ("--method", "wanda", "--calibration", "jsonl:chat.jsonl", "--num-samples", 4)
    ran = lampctl("run", "m", *MAGNITUDE, *wanda, *flags)
    assert ran.code == 0, ran.err
    assert "chat.jsonl, 2 passed over" in " ".join(ran.out.split()) + " ".join(ran.err.split())


def test_evaluate_limits_seqlen_to_the_models_positions(lampctl, tmp_path, words):
    save(tmp_path / "m", "opt")
    usual = lampctl("evaluate", "m", "--data", "text:words.txt", "--json")
    assert usual.json["measured"][0]["seqlen"] == 128
    refused = lampctl("evaluate", "m", "--data", "text:words.txt", "--seqlen", 256)
    assert (refused.code, "use --seqlen 128 or less" in refused.err) == (2, True)
    refused = lampctl("evaluate", "m", "--data", "text:words.txt", "--max-tokens", 100)
    assert (refused.code, "less than one window" in refused.err) == (2, True)


def test_evaluate_refuses_what_is_neither_run_nor_model(lampctl, tmp_path):
    (tmp_path / "empty").mkdir()
    refused = lampctl("evaluate", "empty")
    assert (refused.code, "neither a run" in refused.err) == (2, True)
    refused = lampctl("evaluate", "runs/typo")
    assert (refused.code, "there is no run" in refused.err) == (2, True)
    refused = lampctl("evaluate", str(TINY_OPT), "--data", "")
    assert (refused.code, "nothing to measure" in refused.err) == (2, True)


@pytest.fixture
def _datasets_cache_of_its_own(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("_datasets_cache_of_its_own")
def test_evaluate_measures_zero_shot_tasks_of_a_model(lampctl, tmp_path):
    save(tmp_path / "m", "llama")
    write_rows(tmp_path / "rows")
    answer = lampctl("evaluate", "m", "--task-data", "rows", "--json")
    assert answer.code == 0, answer.err
    found = {each["task"]: each["metrics"] for each in answer.json["accuracies"]}
    assert len(found) == 7
    assert answer.json["measured"] == []
    mean = answer.json["means"]
    assert mean["acc"] == {"mean": pytest.approx(sum(m["acc"] for m in found.values()) / 7), "num_tasks": 7}
    assert mean["acc_norm"]["num_tasks"] == 4
    shown = lampctl("evaluate", "m", "--task-data", "rows", "--tasks", "arc_easy,boolq", "--limit", 1).out
    assert "first 1 of 3 only" in shown
    assert "partial" in shown.split("mean")[1]
    assert "--include_path" in shown


@pytest.mark.usefixtures("_datasets_cache_of_its_own")
def test_evaluate_commits_accuracies_of_a_run(lampctl, tmp_path):
    save(tmp_path / "m", "llama")
    rows = write_rows(tmp_path / "rows")
    done = lampctl("run", "m", *MAGNITUDE, "--tasks", "arc_easy,rte", "--task-data", "rows", "--json")
    assert done.code == 0, done.err
    found = {(each["which"], each["task"]): each for each in done.json["accuracies"]}
    assert sorted(found) == [(which, task) for which in ("dense", "pruned") for task in ("arc_easy", "rte")]
    assert done.json["mean_accuracies"]["pruned"]["acc"]["num_tasks"] == 2
    names = [json.loads(path.read_text())["step"] for path in sorted((tmp_path / "r" / "commits").iterdir())]
    assert names[-4:] == [f"zero-shot/{which}/{t}@{rows}" for which in ("pruned", "dense") for t in ("arc_easy", "rte")]
    assert "arc_easy (acc_norm)" in (tmp_path / "r" / "model" / "README.md").read_text()
    # The same again does nothing; the exported folder by itself gives the same figures.
    assert lampctl("evaluate", "r", "--json").json["accuracies"] == done.json["accuracies"]
    alone = lampctl("evaluate", "r/model", "--tasks", "rte", "--task-data", "rows", "--json").json["accuracies"][0]
    assert alone["metrics"] == found["pruned", "rte"]["metrics"]
    partial = lampctl("evaluate", "r", "--tasks", "boolq", "--limit", 1)
    assert partial.code == 0, partial.err
    assert "first 1 of 2 only" in partial.out
    status = lampctl("status", "r").out
    assert "all (3)" in status
    assert "first 1 of 2 only" in status
    assert len(lampctl("status", "r", "--json").json["accuracies"]) == 2
    (rows / "boolq" / "val.jsonl").write_text('{"question": "q", "passage": "p", "label": "true"}\n')
    changed = lampctl("evaluate", "r", "--tasks", "boolq")
    assert (changed.code, "have changed since" in changed.err) == (3, True)
    refused = lampctl("evaluate", "r", "--device", "cpu")
    assert (refused.code, "--device: r is a run" in refused.err) == (2, True)


@pytest.mark.slow
@pytest.mark.usefixtures("_datasets_cache_of_its_own")
def test_zero_shot_accuracy_equals_lm_evaluation_harness(lampctl, tmp_path):
    save(tmp_path / "m", "llama")
    write_rows(tmp_path / "rows")
    ours = lampctl(
        "evaluate", "m", "--tasks", "arc_easy,boolq", "--task-data", "rows", "--device", "cpu", "--json"
    ).json
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=m", "--device", "cpu"]
    command += ["--batch_size", "1", "--include_path", ours["task_files"], "--tasks", "arc_easy,boolq"]
    subprocess.run([*command, "--output_path", "theirs"], check=True)
    found = json.loads(next(Path("theirs").rglob("results*.json")).read_text())["results"]
    for each in ours["accuracies"]:
        theirs = {key.removesuffix(",none"): value for key, value in found[each["task"]].items()}
        assert each["metrics"] == {name: theirs[name] for name in each["metrics"]}
