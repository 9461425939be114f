"""examples/plugin, installed as a package of its own: a pruner and a metric that nothing in lampctl knows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_OPT

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the plugin installed in it, as pip does it."""
    folder = tmp_path_factory.mktemp("plugin")
    target, source = folder / "site", folder / "source"
    before = set(PLUGIN.rglob("*"))
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    assert set(PLUGIN.rglob("*")) == before  # the checkout stays as it is
    return target


# Calls lampctl once for each list of arguments, and prints the exit codes and what was said.
_CALLS = """
import contextlib, io, json, sys
from lampctl.app import main

answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, said, code = ["lampctl", *arguments], io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""


@pytest.fixture
def call(site, tmp_path):
    """lampctl, several times, in a process of its own that has the plugin on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}

    def calls(*commands):
        command = [sys.executable, "-c", _CALLS, json.dumps([[*map(str, arguments)] for arguments in commands])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout)
        assert [code for code, _ in answers] == [0] * len(commands), done.stderr
        return [said for _, said in answers]

    return calls


RUN = ("run", TINY_OPT, "--sparsity", 0.5, "--method", "random", "--seqlen", 64, "--device", "cpu", "--threads", 1)
EVALUATED = ("--evaluate", "pydocs", "--eval-max-tokens", 512, "--metrics", "token-accuracy")


def test_its_pruner_and_metric_run_and_appear_everywhere(call, tmp_path):
    place = "runs/tiny-opt-s50-random"
    done, compared, state, _, shown = call(
        (*RUN, *EVALUATED),
        ("compare", place, "--json"),
        ("status", place, "--json"),
        ("report", place, "--out", "report"),
        ("run", "--help"),
    )
    assert "token accuracy" in done
    assert "random" in done
    assert "random" in shown
    assert "token-accuracy" in compared
    state = json.loads(state)
    values = {(found["metric"], found["which"]): found[found["metric"]] for found in state["evaluations"]}
    assert 0 <= values["token-accuracy", "pruned"] < values["token-accuracy", "dense"] <= 1
    assert values["perplexity", "pruned"] > values["perplexity", "dense"]

    page = (tmp_path / "report" / "index.html").read_text()
    assert "token accuracy" in page
    assert "random" in page
    card = (tmp_path / place / "model" / "README.md").read_text()
    assert "pruned by random" in card
    assert "token accuracy on pydocs" in card

    call((*RUN, "--evaluate", "", "--run-dir", "again"))
    files = sorted((tmp_path / place / "model").glob("model-*.safetensors"))
    assert len(files) == 7  # six blocks, and what is outside of them
    for path in files:
        assert path.read_bytes() == (tmp_path / "again" / "model" / path.name).read_bytes()

    without = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-m", "lampctl", "status", place], cwd=tmp_path, env=without, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr


def test_it_passes_the_conformance_kits(site):
    code = (
        "from stages.pruners.registry import PRUNERS; from stages.testing.pruners import check_pruner;"
        "check_pruner(PRUNERS.get('random'));"
        "from stages.metrics.registry import METRICS; assert METRICS.get('token-accuracy').title == 'token accuracy'"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_accuracy_is_that_of_a_plain_loop(site, monkeypatch):
    """The same windows through the whole model of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.data.registry import parse_source
    from stages.data.tokenization import evaluation_tokens, load_tokenizer
    from stages.in_memory import ListScratch, NullCallbacks
    from stages.metrics.base import EvaluationProtocol, MetricContext
    from stages.models.registry import open_model
    from stages.models.resolve import resolve
    from stages.testing.metrics import check_metric
    from tests.blocks import FP32

    monkeypatch.syspath_prepend(str(site))
    from lampctl_example_plugin.token_accuracy import TokenAccuracy

    model, source = open_model(resolve(str(TINY_OPT))), parse_source("pydocs")
    protocol = EvaluationProtocol(64, 512)
    context = MetricContext(model, model, source, protocol, ListScratch(), FP32, NullCallbacks())
    measured = check_metric(TokenAccuracy, context)

    whole = AutoModelForCausalLM.from_pretrained(TINY_OPT).eval()
    tokens = evaluation_tokens(source, load_tokenizer(TINY_OPT))[:512].view(-1, 64)
    with torch.no_grad():
        hits = [(whole(row[None]).logits[0, :-1].argmax(-1) == row[1:]).double().mean() for row in tokens]
    assert measured.value == pytest.approx(torch.stack(hits).mean().item(), abs=1e-12)
