"""`--memory-limit` on a mixture of experts: several passes over the inputs of a block, and the same weights."""

import json

import pytest
import torch
import transformers as tf

from stages.errors import ResourceError
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.pruners.registry import PRUNERS
from stages.runtime.memory_estimate import Shapes, Work, peaks
from stages.runtime.memory_planner import Room, fit
from tests.conftest import PRUNING_ALONE
from tests.small_models import VOCAB, tokenizer

pytestmark = pytest.mark.long

SEQLEN = 32
WORK = Work(PRUNERS.get("sparsegpt"), trains=False, is_quantized=False, eval_tokens=0)
FLAGS = (
    *("--sparsity", "0.5", "--method", "sparsegpt", "--calibration", "text:words.txt", "--num-samples", "4"),
    *("--seqlen", SEQLEN, "--evaluate", "", "--device", "cpu", "--threads", 1, *PRUNING_ALONE),
)


@pytest.fixture(autouse=True)
def _no_other_memory(words, monkeypatch):
    """The file that FLAGS names, and a process that takes no memory beside the model."""
    monkeypatch.setattr("stages.machine.device.memory_in_use", lambda device: 0)
    # What it really takes is far above such limits.
    monkeypatch.setattr("stages.machine.device.PeakMemory.process_bytes", lambda self: 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose experts have more bytes of Hessians than of weights."""
    folder = tmp_path_factory.mktemp("models") / "m"
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=12,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    tf.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def limits(model):
    """The smallest limit with which one pass is enough, one below it, and the smallest one."""
    shapes = Shapes.of(open_model(resolve(str(model))), SEQLEN, 4)
    one_pass = max(peaks(shapes, WORK, 8, spills=False).values())
    low, high = 0, one_pass
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fit(shapes, WORK, 0, Room(0, middle), [8])
            high = middle
        except ResourceError:
            low = middle
    assert high < 0.9 * one_pass
    return {"enough": one_pass, "too little": one_pass - 1, "smallest": high}


def contents(run):
    """What every step has committed."""
    commits = [json.loads(path.read_text()) for path in sorted((run / "commits").iterdir())]
    return [(commit["step"], commit["result"], files_of(commit)) for commit in commits]


def files_of(commit):
    return {
        name: [{key: value for key, value in file.items() if key != "path"} for file in payload["files"]]
        for name, payload in commit["payloads"].items()
    }


def passes_said(answer):
    lines = [line for line in answer.err.splitlines() if "passes over its inputs collect them" in line]
    return int(lines[0].split("left for them: ")[1].split()[0]) if lines else 1


def test_the_number_of_passes_follows_from_the_limit_and_changes_no_commit(lampctl, model, limits, tmp_path):
    said = {}
    for name, limit in {"none": None, **limits}.items():
        given = () if limit is None else ("--memory-limit", f"{limit}B")
        answer = lampctl("run", model, *FLAGS, *given, "--run-dir", tmp_path / name)
        assert answer.code == 0, answer.err
        said[name] = passes_said(answer)
        assert contents(tmp_path / name) == contents(tmp_path / "none"), name
    assert said["none"] == said["enough"] == 1
    assert 2 <= said["too little"] < 5 <= said["smallest"]


def test_the_limit_may_change_between_blocks(lampctl, model, limits, tmp_path):
    expected = lampctl("run", model, *FLAGS, "--run-dir", tmp_path / "quiet")
    assert expected.code == 0, expected.err
    begin = ("run", model, *FLAGS, "--run-dir", tmp_path / "run")
    answer = lampctl(*begin, "--memory-limit", f"{limits['smallest']}B", "--max-runtime", "0.001")
    assert answer.code == 75, answer.err
    answer = lampctl(*begin, "--memory-limit", f"{limits['enough']}B")
    assert answer.code == 0, answer.err
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


def test_only_less_than_one_layer_needs_is_refused(lampctl, model, limits, tmp_path):
    answer = lampctl("run", model, *FLAGS, "--memory-limit", "100kB", "--run-dir", tmp_path / "run")
    assert answer.code == 5, answer.err
    assert "is too little: this run needs 0.01GB of memory" in answer.err
    assert not (tmp_path / "run").exists()
