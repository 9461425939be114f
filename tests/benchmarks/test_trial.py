"""A trial of a whole model: every block is pruned and distilled, and the line says what it gave."""

import json

import pytest

from benchmarks.quality import trial
from tests.conftest import TINY_OPT

pytestmark = pytest.mark.long


@pytest.mark.parametrize("whole", [True, False])
def test_a_trial_appends_its_line(whole, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {number} of the text," for number in range(4000)))
    flags = (
        "--pruner magnitude --epochs 0 --refine-epochs 1 --num-samples 8 --seqlen 32 --eval-max-tokens 256 --blocks 2"
    )
    model = ["--model", str(TINY_OPT), "--calibration", str(text), "--evaluate", str(text)]
    out = tmp_path / "trials.jsonl"
    flags = [*flags.split(), *model, *["--whole"] * whole, "--work", str(tmp_path), "--out", str(out)]
    for _ in range(1 if whole else 2):
        monkeypatch.setattr("sys.argv", ["trial", *flags])
        trial.main()
    first, *again = (json.loads(line) for line in out.read_text().splitlines())
    assert all(line["perplexity"] == first["perplexity"] for line in again)
    assert first["perplexity"] > 1
    assert first["command"].startswith("--pruner magnitude")
    if whole:
        assert first["distilled kl"] < first["kl"]
        assert first["distill lr"].endswith("%")
    else:
        assert "kl" not in first
