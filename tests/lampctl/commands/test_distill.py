"""Distillation from the user's side: on a small OPT that has learnt something, and on a smaller model that has not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ConfigError
from stages.machine import device
from stages.training.student import Streamed
from tests import small_models, small_sam
from tests.conftest import TINY_OPT
from tests.killed_runs import exported_weights

pytestmark = pytest.mark.long

DATA = ("--calibration", "pydocs", "--num-samples", "16", "--seqlen", "64", "--evaluate", "", "--device", "cpu")
WORDS = ("--calibration", "text:words.txt", "--num-samples", "8", "--seqlen", "16", "--evaluate", "", "--device", "cpu")
DISTILL = ("--distill", "--distill-batch", "4", "--distill-lr", "3e-4")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(path).items()}


def result(run: Path, step: str) -> dict:
    commits = [json.loads(path.read_text()) for path in sorted((run / "commits").iterdir())]
    return next(commit["result"] for commit in commits if commit["step"] == step)


def steps(run: Path) -> list[str]:
    return [json.loads(path.read_text())["step"].partition("/")[0] for path in sorted((run / "commits").iterdir())]


@pytest.fixture
def model(tmp_path, words):
    """A model of three blocks; words.txt is beside it."""
    return small_models.save(tmp_path / "source", "llama")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of SparseGPT without distillation."""
    from lampctl.api import run

    folder = tmp_path_factory.mktemp("plain") / "run"
    run(
        str(TINY_OPT), sparsity=0.6, method="sparsegpt", calibration="pydocs", num_samples=16, seqlen=64, evaluate=(),
        device="cpu", run_dir=folder,
    )  # fmt: skip
    return folder


def test_only_kept_weights_of_the_blocks_change_and_the_loss_falls(lampctl, plain, tmp_path):
    told = lampctl("run", TINY_OPT, "--sparsity", "0.6", "--method", "sparsegpt", *DATA, *DISTILL, "--run-dir", "run")
    found = result(Path("run"), "distill")
    assert found["after"] < found["before"]
    assert "KL divergence to the dense model" in told.err
    assert steps(Path("run"))[-4:] == ["teach", "distill", "export", "end-loss"]
    before, after = weights(plain), weights(Path("run"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers." in name for name in changed), "what is outside the blocks stays"
    for name, tensor in before.items():
        if tensor.ndim == 2 and ".layers." in name:
            assert bool((after[name][tensor == 0] == 0).all()), name
    assert lampctl("report", "run", "--out", "report").code == 0
    assert "Distillation" in (tmp_path / "report" / "index.html").read_text()
    assert "KL divergence" in lampctl("status", "run").out
    quick = (
        "import sys; from lampctl.app import main; sys.argv = ['lampctl', 'status', 'run']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", quick], check=True, capture_output=True)


def test_one_block_in_memory_gives_the_weights_of_all_in_memory(lampctl, model, monkeypatch):
    arguments = (model, "--sparsity", "0.6", *WORDS, "--epochs", "1", "--refine-epochs", "1", *DISTILL)
    assert lampctl("run", *arguments, "--run-dir", "resident").code == 0
    assert steps(Path("resident"))[-4:] == ["generate", "distill", "export", "end-loss"]
    assert "teach" not in steps(Path("resident")), "LAMP has the dense output already"
    loaded = []
    load = Streamed._load
    monkeypatch.setattr(Streamed, "_load", lambda self, *rest, **more: loaded.append(rest) or load(self, *rest, **more))
    monkeypatch.setattr(device, "memory_available", lambda device: 0)
    assert lampctl("run", *arguments, "--run-dir", "streamed").code == 0
    assert loaded, "nothing was streamed"
    assert exported_weights(Path("resident")) == exported_weights(Path("streamed"))


def test_the_command_of_the_step_does_it(lampctl, model):
    arguments = (model, "--sparsity", "0.6", "--method", "magnitude", *WORDS, *DISTILL)
    assert lampctl("init", *arguments, "--run-dir", "run").code == 0
    early = lampctl("distill", "run")
    assert early.code == 2
    assert "this step comes later; call lampctl calibrate" in early.err
    assert lampctl("calibrate", "run").code == 0
    for _block in range(3):
        assert lampctl("prune-block", "run").code == 0
    assert "lampctl distill " in lampctl("teach", "run").out
    assert "lampctl export " in lampctl("distill", "run").out
    assert lampctl("export", "run").code == 0


@pytest.mark.parametrize("method", ["magnitude", pytest.param("wanda", marks=pytest.mark.slow), "lamp"])
def test_a_distillation_set_of_its_own(lampctl, method):
    short = ("--epochs", "1", "--no-refine") if method == "lamp" else ()
    own = ("--distill-samples", "40", "--distill-generated", "0")
    arguments = (TINY_OPT, "--sparsity", "0.5", "--method", method, *DATA, "--seqlen", "32", *short, *DISTILL, *own)
    lampctl("run", *arguments, "--run-dir", "run")
    found = result(Path("run"), "distill")
    assert found["num_held_out"] == 2, "1 sample in 16 of its own set"
    assert found["after"] < found["before"]
    assert result(Path("run"), "teach")["samples"]["amount"] == 40 * 32
    assert ("calibrate" in steps(Path("run"))) == (method != "magnitude")


def test_what_the_model_writes_is_the_default_of_lamp_and_can_be_left_out(lampctl, model, tmp_path):
    # Without held-out samples the last weights are kept, whatever they are worth.
    arguments = (model, "--sparsity", "0.6", *WORDS, "--epochs", "1", "--refine-epochs", "1", *DISTILL, "--no-held-out")
    assert lampctl("run", *arguments, "--run-dir", "usual").code == 0
    assert result(Path("usual"), "generate") == {"num_samples": 8, "num_tokens": 8 * 16, "num_real": 8 * 4}
    assert "128 tokens in 8 samples" in lampctl("status", "usual").out
    more = lampctl("run", *arguments, "--distill-generated", "3", "--run-dir", "more")
    assert result(Path("more"), "generate")["num_samples"] == 3, more.err
    assert exported_weights(Path("more")) != exported_weights(Path("usual"))
    assert lampctl("run", *arguments, "--distill-generated", "0", "--run-dir", "without").code == 0
    assert "generate" not in steps(Path("without"))
    after = lampctl(
        "run", *arguments[:3], "--method", "wanda", *WORDS, "--distill-generated", "4", "--run-dir", "wanda"
    )
    assert after.code == 0, after.err
    assert steps(Path("wanda"))[-5:] == ["teach", "generate", "distill", "export", "end-loss"]
    sam = small_sam.save(tmp_path / "sam")
    images = f"coco:{small_sam.coco(tmp_path / 'images', 2)}"
    refused = lampctl("run", sam, "--sparsity", "0.5", "--calibration", images, "--distill-generated", "2")
    assert refused.code == 2
    assert "--distill-generated" in refused.err
    assert "writes no text" in refused.err


def test_a_damaged_distilled_block_is_made_again(lampctl, model):
    lampctl("run", model, "--sparsity", "0.6", "--method", "wanda", *WORDS, *DISTILL, "--run-dir", "run")
    expected = exported_weights(Path("run"))
    commits = [json.loads(path.read_text()) for path in sorted(Path("run/commits").iterdir())]
    distilled = next(commit for commit in commits if commit["step"] == "distill")
    path = Path("run") / distilled["payloads"]["distilled/2"]["files"][0]["path"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # the exported shard is a hard link to it
    path.write_bytes(data)
    told = lampctl("resume", "run", "--check-all")
    assert "distilled/2 is made again" in told.err
    assert exported_weights(Path("run")) == expected
    assert lampctl("verify", "run", "--deep").code == 0


def test_settings_that_exclude_each_other_are_named(lampctl):
    arguments = ("run", TINY_OPT, "--sparsity", "0.6", *DATA)
    refused = lampctl(*arguments, "--no-distill", "--distill-lr", "1e-3")
    assert refused.code == 2
    assert "--no-distill excludes --distill-lr" in refused.err
    refused = lampctl(*arguments, "--distill-samples", "100000")
    assert refused.code == 2
    assert "--distill-samples 100000" in refused.err
    assert "lower --distill-samples" in refused.err


def test_settings_of_distillation_switch_it_on(lampctl):
    shown = lampctl("config", "show", TINY_OPT, "--sparsity", "0.6", *DATA, "--distill-epochs", "2", "--json").json
    assert shown["settings"]["distill_epochs"]["value"] == 2


def test_a_model_in_memory_gets_the_weights_of_the_run(lampctl, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lampctl as package

    settings = {"sparsity": 0.6, "num_samples": 8, "seqlen": 32, "epochs": 0, "refine_epochs": 1}
    settings |= {"distill": True, "distill_batch": 4, "distill_lr": 3e-4, "distill_samples": 16}
    arguments = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    arguments = [part for part in arguments if part is not True]
    text = "text:words.txt"
    told = lampctl(
        "run", model, *arguments, "--calibration", text, "--evaluate", "", "--device", "cpu", "--run-dir", "run"
    )
    assert told.code == 0, told.err
    original, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    pruned, report = package.prune(original, text, tokenizer=tokenizer, **settings)
    assert report.distillation.after == result(Path("run"), "distill")["after"]
    assert report.end_loss.value == pytest.approx(result(Path("run"), "end-loss")["value"], rel=1e-5)
    state = pruned.state_dict()
    for name, tensor in weights(Path("run")).items():
        assert torch.equal(state[name], tensor), name
    with pytest.raises(ConfigError, match="distill_samples"):
        package.prune(original, [[5, 6, 7, 8]] * 4, sparsity=0.5, method="wanda", distill_samples=8)


def test_token_ids_are_the_set_of_distillation_at_any_effort(model):
    from transformers import AutoModelForCausalLM

    import lampctl as package

    original = AutoModelForCausalLM.from_pretrained(model)
    short = {"epochs": 1, "refine_epochs": 1, "distill_epochs": 1}
    _, report = package.prune(original, [[5, 6, 7, 8, 9, 10]] * 4, sparsity=0.5, effort="high", **short)
    assert report.settings["distill_samples"] is None
    assert report.distillation is not None


def test_a_run_takes_over_the_blocks_of_a_finished_one(lampctl, model):
    arguments = (model, "--sparsity", "0.6", *WORDS, "--epochs", "1", "--refine-epochs", "1")
    assert lampctl("run", *arguments, "--run-dir", "whole", *DISTILL).code == 0
    assert lampctl("run", *arguments, "--no-distill", "--run-dir", "plain").code == 0
    late = lampctl("distill", "plain")
    assert late.code == 2
    assert "lampctl run MODEL ... --distill --from-run" in late.err

    told = lampctl("run", *arguments, *DISTILL, "--from-run", "plain", "--run-dir", "more")
    assert told.code == 0, told.err
    assert exported_weights(Path("more")) == exported_weights(Path("whole"))
    lines = [line for line in told.err.splitlines() if "steps taken over from" in line or line.startswith("[")]
    assert len(lines) == 6, "what was taken over has no line of its own"
    num_taken = int(lines[0].split()[0])
    commits = [json.loads(path.read_text()) for path in sorted(Path("more/commits").iterdir())]
    theirs = {c["step"]: c for c in (json.loads(p.read_text()) for p in Path("plain/commits").iterdir())}
    taken = [commit for commit in commits if commit["result"].get("shared_with")]
    assert all(commit["elapsed_s"] == theirs[commit["step"]]["elapsed_s"] for commit in taken)
    own = [commit["step"] for commit in commits if not commit["result"].get("shared_with")]
    assert own == ["teach", "generate", "distill", "export", "end-loss"]
    assert num_taken == len(taken)
    assert lampctl("verify", "more", "--deep").code == 0
    assert "refined" in lampctl("status", "more").out

    refused = lampctl("run", *arguments[:-1], "2", *DISTILL, "--from-run", "plain", "--run-dir", "other")
    assert refused.code == 3
    assert "\n  refine_epochs: 1 there, 2 asked for\n" in refused.err
    refused = lampctl("run", *arguments, *DISTILL, "--from-run", "nowhere", "--run-dir", "other")
    assert refused.code == 2
    assert not Path("other").exists()


@pytest.fixture
def taken_over(lampctl, model):
    """The command that takes over the blocks of a finished run of Wanda on words.txt."""
    arguments = (model, "--sparsity", "0.6", "--method", "wanda", *WORDS)
    assert lampctl("run", *arguments, "--run-dir", "plain").code == 0
    return ("run", *arguments, *DISTILL, "--from-run", "plain", "--run-dir", "more")


def test_a_run_that_takes_over_blocks_may_differ_in_whatever_only_distillation_uses(lampctl, model, taken_over):
    assert lampctl(*taken_over, "--no-held-out", "--effort", "low").code == 0
    plain = (model, "--sparsity", "0.6", "--method", "magnitude", "--evaluate", "", "--device", "cpu")
    assert lampctl("run", *plain, "--run-dir", "p").code == 0
    answer = lampctl("run", *plain, *WORDS, *DISTILL, "--seqlen", "8", "--from-run", "p", "--run-dir", "q")
    assert answer.code == 0, answer.err
    assert lampctl("run", *plain, *WORDS, *DISTILL, "--seqlen", "8", "--run-dir", "whole").code == 0
    assert exported_weights(Path("q")) == exported_weights(Path("whole"))


def test_a_run_that_has_lost_a_block_is_not_taken_over(lampctl, taken_over):
    commits = [json.loads(path.read_text()) for path in sorted(Path("plain/commits").iterdir())]
    payload = next(c["payloads"]["pruned/1"] for c in commits if "pruned/1" in c["payloads"])
    shutil.rmtree(Path("plain") / payload["root"])
    refused = lampctl(*taken_over)
    assert refused.code == 3
    assert "it lacks what prune-block/1 wrote" in refused.err
    assert lampctl("resume", "plain", "--check-all").code == 0
    assert lampctl(*taken_over).code == 0
    assert lampctl("verify", "more", "--deep").code == 0


def test_a_run_on_a_text_that_has_changed_is_not_taken_over(lampctl, taken_over, words):
    words.write_text(words.read_text() + "more")
    refused = lampctl(*taken_over)
    assert refused.code == 3
    assert "words.txt has changed since that run began" in refused.err
    assert not Path("more").exists()


def test_the_blocks_of_a_method_without_data_are_taken_over(lampctl, model):
    arguments = (model, "--sparsity", "0.6", "--method", "magnitude", *WORDS)
    assert lampctl("run", *arguments, "--run-dir", "plain").code == 0
    assert lampctl("run", *arguments, *DISTILL, "--run-dir", "whole").code == 0
    told = lampctl("run", *arguments, *DISTILL, "--from-run", "plain", "--run-dir", "more")
    assert told.code == 0, told.err
    assert exported_weights(Path("more")) == exported_weights(Path("whole"))
