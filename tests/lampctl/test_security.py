"""Secrets that never reach a run directory or a screen; code that is run only if somebody says so."""

import json
import re
import sys
from pathlib import Path

import pytest

from pipeline.rundir.redact import scrub
from tests.conftest import PRUNING_ALONE
from tests.small_models import save

FLAGS = (
    *("--sparsity", "0.5", "--num-samples", "3", "--seqlen", "16", "--eval-seqlen", "16", "--epochs", "1"),
    *PRUNING_ALONE,
)
CANARIES = {
    "HF_TOKEN": "hf_" + "c4n4ry" * 6,
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret/0123456789",
    "AWS_SESSION_TOKEN": "canary-session-token-0123456789",
    "AZURE_STORAGE_ACCOUNT_KEY": "canaryazurekey0123456789==",
    "MY_PASSWORD": "canary-password",
}


@pytest.fixture
def canaries(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    return CANARIES.values()


def test_no_secret_of_the_environment_is_written_or_shown(lampctl, canaries, tmp_path, words, monkeypatch):
    model = save(tmp_path / "m", "llama")
    data = ("--calibration", f"text:{words}", "--evaluate", f"text:{words}")
    answers = [lampctl("run", model, *FLAGS, *data, "--run-dir", "r")]
    # What goes wrong may quote anything: here every error quotes every secret.
    for kind in (RuntimeError, OSError, ValueError):

        def fail(*args, kind=kind, **kwargs):
            raise kind(f"the request was sent with {' '.join(CANARIES.values())} to https://user:canary-password@host/")

        with monkeypatch.context() as patch:
            patch.setattr("stages.prune_block.prune_block", fail)
            answers.append(lampctl("run", model, *FLAGS, *data, "--run-dir", f"r-{kind.__name__}"))
    assert [answer.code for answer in answers] == [0, 1, 1, 1], answers[0].err
    assert "this is a bug of ours" in answers[1].err
    assert "***" in answers[1].err
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    shown = [text.encode() for answer in answers for text in (answer.out, answer.err)]
    for canary in canaries:
        assert not any(canary.encode() in text for text in (*written, *shown)), canary


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:hunter22@host/x", "https://***@host/x"),
        (
            "GET https://b.s3.amazonaws.com/k?X-Amz-Signature=abc&x=1",
            "GET https://b.s3.amazonaws.com/k?X-Amz-Signature=***&x=1",
        ),
        ("with hf_abcdefghijklmnopqrstuvwxyz", "with ***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("tokens per second = 5; a keyed table", "tokens per second = 5; a keyed table"),
        ("/home/me/keys/file: no such file", "/home/me/keys/file: no such file"),
    ],
)
def test_scrub_replaces_keys_tokens_and_passwords(text, expected):
    assert scrub(text, {}) == expected


def test_scrub_keeps_short_values_and_paths_of_credential_files(tmp_path):
    path = tmp_path / "credentials.json"
    path.touch()
    environ = {"A_TOKEN": "short", "GOOGLE_APPLICATION_CREDENTIALS": str(path)}
    assert scrub(f"short {path}", environ) == f"short {path}"


def test_preemption_url_with_a_password_is_refused(lampctl, tmp_path):
    answer = lampctl("run", "x", "--sparsity", "0.5", "--preemption-url", "http://me:secret@host/")
    assert answer.code == 2
    assert "--preemption-url" in answer.err
    assert "secret" not in answer.err


CONFIGURATION = """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
"""
MODEL = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
Path({proof!r}).write_text("run")
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def model_with_code(tmp_path, monkeypatch) -> Path:
    folder = save(tmp_path / "m", "llama")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": auto}))
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODEL.format(proof=str(tmp_path / "proof")))
    return folder


def test_remote_code_needs_trust_remote_code(lampctl, model_with_code, tmp_path, words):
    data = ("--calibration", f"text:{words}", "--evaluate", f"text:{words}", "--run-dir", "r")
    answer = lampctl("run", model_with_code, *FLAGS, *data)
    assert answer.code == 2
    assert "--trust-remote-code" in answer.err
    assert not (tmp_path / "proof").exists()
    answer = lampctl("run", model_with_code, *FLAGS, *data, "--trust-remote-code")
    assert answer.code == 0, answer.err
    assert (tmp_path / "proof").exists()
    assert json.loads(Path("r/run.json").read_text())["config"]["trust_remote_code"] is True
    assert Path("r/model/modeling_mine.py").read_text() == (model_with_code / "modeling_mine.py").read_text()


def test_nothing_is_unpickled_but_tensors_and_only_when_converting():
    root = Path(__file__).parents[2]
    unsafe = re.compile(
        r"(?<!safetensors\.)torch\.load\(|pickle\.load|np\.load\(|allow_pickle|marshal|yaml\.load\(|\beval\(|\bexec\("
    )
    found = []
    for package in ("lampctl", "pipeline", "stages"):
        for path in (root / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                # BaseLoader makes nothing but texts, lists and mappings.
                if unsafe.search(line) and ".eval()" not in line and "Loader=yaml.BaseLoader" not in line:
                    found.append((path.relative_to(root).as_posix(), number, line.strip()))
    converting = ["stages/models/convert.py", "stages/models/sam/checkpoint.py"]
    assert sorted(path for path, _, _ in found) == converting, found
    assert "weights_only=True" in found[0][2]
