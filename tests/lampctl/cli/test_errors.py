"""Wrong input gets one clear line, its exit code, and touches nothing; so do damage and a full disk."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.rundir import filesystem
from tests import hub
from tests.conftest import PRUNING_ALONE
from tests.small_models import save

DATA = (
    *("--calibration", "text:words.txt", "--num-samples", "3", "--seqlen", "64"),
    *("--evaluate", "text:words.txt", "--device", "cpu", *PRUNING_ALONE),
)
BAD = [
    (("--sparsity", "0"), "--sparsity 0", 2),
    (("--sparsity", "1"), "--sparsity 1", 2),
    (("--sparsity", "1.5"), "less than 1", 2),
    ((), "--sparsity is missing", 2),
    (("--sparsity", "half"), "--sparsity", 2),
    (("--sparsity", "0.5", "--method", "lmap"), "choose one of lamp, sparsegpt, alps, wanda, magnitude", 2),
    (("--sparsity", "0.5", "--preset", "slow"), "choose one of quick, paper", 2),
    (("--sparsity", "0.5", "--device", "tpu"), "--device tpu", 2),
    (("--sparsity", "0.5", "--device", "cuda:7"), "no such GPU", 5),
    (("--sparsity", "0.5", "--dtype", "int8"), "--dtype int8", 2),
    (("--sparsity", "0.5", "--calibration", "wiki"), "is not a data source", 2),
    (("--sparsity", "0.5", "--calibration", "text:gone.txt"), "no such text file", 2),
    (("--sparsity", "0.5", "--calibration", "text:short.txt"), "tokens for calibration", 2),
    (("--sparsity", "0.5", "--evaluate", "text:short.txt"), "tokens for evaluation", 2),
    (("--sparsity", "0.5", "--calibration", "text:binary.txt"), "no UTF-8 text", 2),
    (("--sparsity", "0.5", "--num-samples", "100000"), "lower --num-samples", 2),
    (("--sparsity", "0.5", "--seqlen", "4096"), "has 128 positions", 2),
    (("--sparsity", "0.5", "--eval-max-tokens", "10"), "less than one window", 2),
    (("--sparsity", "0.5", "--ignore", "nosuchlayer"), "no layer has such a name", 2),
    (("--sparsity", "0.5", "--ignore", "("), "not a regular expression", 2),
    (("--sparsity", "0.5", "--ignore", "."), "no layer to prune", 2),
    (("--sparsity", "0.95", "--alpha", "0.5"), "use a larger alpha", 2),
    (("--sparsity", "0.9", "--beta", "0.9"), "a smaller beta", 2),
    (("--sparsity", "0.5", "--config", "gone.yaml"), "cannot be read", 2),
    (("--sparsity", "0.5", "--config", "odd.yaml"), "colour (file odd.yaml) is not a setting", 2),
    (("--sparsity", "0.5", "--baseline", "lamp"), "runs already", 2),
    (("--sparsity", "0.5", "--baseline", "best"), "--baseline best: choose one of", 2),
    (("--sparsity", "0.5", "--revision", "main"), "only models from the hub have revisions", 2),
    (("--sparsity", "0.5", "--colour", "red"), "--colour", 2),
    (("--sparsity", "0.5", "--lr", "inf"), "such as 1e-3, or such as 1%", 2),
    (("--sparsity", "0.6", "--beta", "1"), "use a smaller beta or less --sparsity", 2),
    (("--sparsity", "0.5", "--calibration", "text:~nosuchuser/x"), "no such user", 2),
    (("--sparsity", "0.5", "--run-dir", "words.txt"), "words.txt is a file", 2),
    (("--sparsity", "0.5", "--run-dir", "words.txt/sub"), "words.txt is a file", 2),
    (("--sparsity", "0.5", "--run-dir", "n" * 300), "File name too long", 2),
    (("--sparsity", "0.5", "--run-dir", ""), "the name of the run directory is empty", 2),
]


@pytest.fixture(autouse=True)
def _words(words):
    """The file that DATA names."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "m", "llama")


@pytest.mark.parametrize(("flags", "message", "code"), BAD, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_line_and_changes_no_file(lampctl, model, flags, message, code):
    Path("short.txt").write_text("too short")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00" * 2000)
    Path("odd.yaml").write_text("colour: red\n")
    before = sorted(Path().iterdir())
    answer = lampctl("run", model, *DATA, *flags)
    assert answer.code == code, answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    "call",
    [
        ("run", "no\nsuch", "--sparsity", "0.5"),
        ("run", "m", "--sparsity", "0.5", "--method", "la\nmp"),
        ("run", "m", "--config", "no\nsuch.yaml"),
        ("run", "m", "--config", "a\nb.yaml"),
        ("run", "m", "--sparsity", "0.5", "--calibration", "text:no\nsuch.txt"),
        ("status", "no\nsuch"),
        ("compare", "no\nsuch"),
        ("evaluate", "runs/no\nsuch"),
        ("export", "no\r\x1b[2Jsuch\n"),
        ("reproduce", "table\n1"),
        ("sweep", "status", "no\nsuch"),
    ],
    ids=lambda call: " ".join(call).replace("\n", "/"),
)
def test_a_line_break_in_a_value_does_not_break_the_message(lampctl, call):
    Path("a\nb.yaml").write_text("x: [1,\ny: 2")
    answer = lampctl(*call)
    assert answer.code == 2
    assert answer.err.startswith("lampctl: ")
    assert answer.err.count("\n") == 1, answer.err
    assert "\\n" in answer.err
    assert "\x1b" not in answer.err


def test_messages_of_several_lines_keep_them(lampctl, monkeypatch):
    monkeypatch.setenv("LAMPCTL_COLOUR", "red")
    monkeypatch.setenv("LAMPCTL_SIZE", "1")
    assert len(lampctl("run", "m", "--sparsity", "0.5").err.splitlines()) == 2


@pytest.mark.parametrize("command", ["status", "resume", "verify", "gc", "export", "calibrate"])
def test_an_empty_run_directory_is_not_the_working_directory(lampctl, model, command):
    begin(lampctl, model)
    for path in [*Path("r").iterdir()]:
        path.rename(path.name)
    answer = lampctl(command, "")
    assert answer.code == 2
    assert "the name of the run directory is empty" in answer.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "at least 1 character"),
        ("~nosuchuser/m", "no such user"),
        ("m" * 300, "File name too long"),
        ("./gone", "no such file or folder"),
        ("a/b/c", "aliases: opt-125m"),
        ("weights.bin", "neither .gguf nor .pth"),
        ("empty", "it has no config.json"),
        ("hollow", "holds no weights"),
        ("broken.gguf", "cannot read this GGUF file"),
    ],
)
def test_unknown_model_names_what_is_accepted(lampctl, name, message):
    Path("weights.bin").write_text("x")
    Path("broken.gguf").write_text("x")
    Path("empty").mkdir()
    Path("hollow").mkdir()
    Path("hollow/config.json").write_text("{}")
    answer = lampctl("run", name, "--sparsity", "0.5")
    assert answer.code == 2
    assert message in answer.err
    assert not Path("runs").exists()


def test_unreachable_hub_names_the_alternative(lampctl, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    answer = lampctl("run", "opt-125m", "--sparsity", "0.5")
    assert answer.code == 5
    assert "facebook/opt-125m comes from the Hugging Face hub, which is out of reach" in answer.err
    assert "local folder or GGUF" in answer.err


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_data_set_that_is_not_in_the_cache_ends_with_5(lampctl, model, monkeypatch, is_offline):
    """Whether an environment variable forbids the hub, or it does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub.refuse(monkeypatch)
    if is_offline:  # as with HF_HUB_OFFLINE=1, which huggingface_hub reads when it is imported

        def offline(*args, **kwargs):
            raise OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled.")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    answer = lampctl("run", model, "--sparsity", "0.5", "--calibration", "hf:me/it", "--evaluate", "")
    assert answer.code == 5, answer.err
    assert "hf:me/it comes from the Hugging Face hub, which is out of reach" in answer.err
    assert "parquet:it.parquet, jsonl:it.jsonl" in answer.err


@pytest.mark.parametrize("command", ["status", "resume"])
def test_a_bucket_out_of_reach_names_what_to_check(lampctl, monkeypatch, command):
    from pipeline.rundir.storage import object_client

    monkeypatch.setattr(object_client, "_NUM_TRIES", 1)
    monkeypatch.setitem(object_client._RETRIES, "max_retries", 0)
    for name, value in (
        ("AWS_ENDPOINT", "http://127.0.0.1:9"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "y"),
    ):
        monkeypatch.setenv(name, value)
    answer = lampctl(command, "s3://bucket/run")
    assert answer.code == 5
    assert "cannot read s3://bucket/run/run.json" in answer.err
    assert "check the network" in answer.err
    assert "credentials" in answer.err


def hub_error(kind):
    """An error as the hub's client raises it."""
    import huggingface_hub.errors as errors

    class Response:
        status_code, headers, text, request = 404, {}, "", None

    return getattr(errors, kind)("refused", response=Response())


@pytest.mark.parametrize(
    ("kind", "message", "code"),
    [
        ("GatedRepoError", "hf auth login", 5),
        ("RevisionNotFoundError", "--revision nosuch: meta-llama/Llama-2-7b-hf has no such", 2),
        ("RepositoryNotFoundError", "no such folder, alias or public model", 2),
    ],
)
def test_gated_models_unknown_revisions_and_unknown_repositories(lampctl, monkeypatch, kind, message, code):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    answer = lampctl("run", "llama-2-7b", "--sparsity", "0.5", "--revision", "nosuch")
    assert answer.code == code
    assert message in answer.err


def test_a_folder_that_holds_something_else_is_left_alone(lampctl, model):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    answer = lampctl("run", model, "--sparsity", "0.5", *DATA, "--run-dir", "mine")
    assert answer.code == 2
    assert "not empty and holds no run" in answer.err
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.tex"]


def begin(lampctl, model, *steps):
    assert lampctl("init", model, "--sparsity", "0.5", *DATA, "--epochs", "1", "--run-dir", "r").code == 0
    for step in steps:
        assert lampctl(step, "r").code == 0


def payload_file(run, step, name):
    for path in sorted((run / "commits").iterdir()):
        commit = json.loads(path.read_text())
        if commit["step"] == step:
            return run / commit["payloads"][name]["files"][0]["path"]
    raise AssertionError(step)


@pytest.mark.parametrize(
    ("step", "payload"), [("capture", "biased/0"), ("capture", "dense/1"), ("calibrate", "calibration")]
)
def test_a_corrupt_chunk_is_named_and_made_again_before_anything_is_computed_with_it(lampctl, model, step, payload):
    begin(lampctl, model, "calibrate", "capture")
    path = payload_file(Path("r"), step, payload)
    good = path.read_bytes()
    data = bytearray(good)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    # These check sizes alone beforehand, and so meet it when they read it.
    answers = [lampctl(command, "r") for command in ("prune-block", "refine-block")]
    assert [answer.code for answer in answers] == [0, 0]
    said = "".join(answer.err for answer in answers)
    assert f"{path}" in said
    assert "is made again" in said
    assert path.read_bytes() == good


def test_a_missing_chunk_and_a_corrupt_weight_are_named_and_made_again(lampctl, model):
    begin(lampctl, model, "calibrate", "capture", "prune-block", "refine-block")
    pruned = payload_file(Path("r"), "refine-block/0", "pruned/0")
    chunk = payload_file(Path("r"), "calibrate", "calibration")
    good, good_chunk = pruned.read_bytes(), chunk.read_bytes()
    pruned.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    chunk.unlink()
    answer = lampctl("resume", "r")
    assert answer.code == 0, answer.err
    assert f"{pruned} is not what was committed" in answer.err
    assert f"{chunk} is missing" in answer.err
    assert pruned.read_bytes() == good
    assert chunk.read_bytes() == good_chunk


class FullAfter(filesystem.Calls):
    """A disk with the given number of bytes left."""

    def __init__(self, room):
        self.room = room

    def write(self, descriptor, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)


@pytest.mark.parametrize("room", [0, 5_000, 100_000, 400_000])
def test_a_full_disk_is_exit_5_and_the_run_goes_on_once_there_is_room(lampctl, model, monkeypatch, room):
    call = ("run", model, "--sparsity", "0.5", *DATA, "--epochs", "1", "--run-dir", "r")
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "calls", FullAfter(room))
        answer = lampctl(*call)
    assert answer.code == 5, answer.err
    assert "full" in answer.err
    assert lampctl(*call).code == 0
    assert lampctl(*call[:-1], "quiet").code == 0
    for path in Path("quiet/model").glob("*.safetensors"):
        assert Path("r/model", path.name).read_bytes() == path.read_bytes()


def test_a_run_written_by_a_newer_version_is_refused_untouched(lampctl, model):
    begin(lampctl, model)
    record = json.loads(Path("r/run.json").read_text())
    Path("r/run.json").write_text(json.dumps({**record, "schema_version": 99}))
    answer = lampctl("resume", "r")
    assert answer.code == 3
    assert "newer lampctl" in answer.err


def test_settings_come_from_flag_environment_file_preset_default_in_this_order(lampctl, model, monkeypatch):
    Path("s.yaml").write_text(yaml.safe_dump({"num-samples": 5, "seqlen": 32, "seed": 7, "sparsity": 0.3}))
    monkeypatch.setenv("LAMPCTL_SEQLEN", "48")
    monkeypatch.setenv("LAMPCTL_SEED", "8")
    answer = lampctl("init", model, "--preset", "quick", "--config", "s.yaml", "--seed", "9", "--run-dir", "r")
    assert answer.code == 0, answer.err
    manifest = json.loads(Path("r/run.json").read_text())
    config, origins = manifest["config"], manifest["provenance"]
    assert (config["seed"], origins["seed"]) == (9, "flag")
    assert (config["seqlen"], origins["seqlen"]) == (48, "environment LAMPCTL_SEQLEN")
    assert (config["num_samples"], origins["num_samples"]) == (5, "file s.yaml")
    assert (config["effort"], origins["effort"]) == ("low", "preset quick")
    assert (config["damping"], origins["damping"]) == (0.01, "default")
    assert (config["sparsity"], origins["sparsity"]) == (0.3, "file s.yaml")


def test_unexpected_exception_is_exit_1_with_a_traceback(lampctl, monkeypatch):
    import pipeline.runs.lifecycle

    def break_down(path):
        raise RuntimeError("surprise")

    monkeypatch.setattr(pipeline.runs.lifecycle, "reopen", break_down)
    Path("r").mkdir()
    answer = lampctl("status", "r")
    assert answer.code == 1
    assert "this is a bug of ours" in answer.err
    assert "Traceback" in answer.err
    assert "surprise" in answer.err


def test_preset_flag_wins_over_environment_and_file(lampctl, model, monkeypatch):
    Path("p.yaml").write_text("preset: paper\n")
    monkeypatch.setenv("LAMPCTL_PRESET", "paper")
    call = ("init", model, "--sparsity", "0.5", *DATA, "--config", "p.yaml", "--preset", "quick", "--run-dir", "r")
    assert lampctl(*call).code == 0
    assert json.loads(Path("r/run.json").read_text())["config"]["effort"] == "low"
    Path("p.yaml").write_text("preset: [quick]\n")
    monkeypatch.delenv("LAMPCTL_PRESET")
    answer = lampctl("init", model, "--sparsity", "0.5", *DATA, "--config", "p.yaml")
    assert answer.code == 2


def test_ignore_pattern_may_contain_a_comma(lampctl, model, monkeypatch):
    monkeypatch.setenv("LAMPCTL_IGNORE", r"layers\.[0-9]{1,2}\.mlp")
    assert lampctl("init", model, "--sparsity", "0.5", *DATA, "--run-dir", "r").code == 0
    budget = json.loads(Path("r/run.json").read_text())["budget"]
    assert not any("mlp" in layer["name"] for block in budget for layer in block["layers"])


@pytest.mark.parametrize("method", ["lamp", "sparsegpt", "wanda", "magnitude"])
def test_non_finite_weights_are_named(lampctl, tmp_path, method):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path / "nan", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    answer = lampctl("run", folder, "--sparsity", "0.5", *DATA, "--method", method)
    assert answer.code == 2
    assert "block 1" in answer.err
    assert "NaN" in answer.err
    assert "--lr" not in answer.err


def test_a_tokenizer_of_another_model_is_refused(lampctl, tmp_path):
    from transformers import AutoTokenizer

    from tests.conftest import TINY_OPT

    folder = save(tmp_path / "m", "llama")
    AutoTokenizer.from_pretrained(TINY_OPT).save_pretrained(folder)
    answer = lampctl("run", folder, "--sparsity", "0.5", *DATA)
    assert answer.code == 2
    assert "the tokenizer of another model" in answer.err
    assert not Path("runs").exists()


def test_tied_weights_that_differ_in_the_files_are_refused(lampctl, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path / "m", "llama-gqa")
    tensors = load_file(folder / "model.safetensors")
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, folder / "model.safetensors", {"format": "pt"})
    call = ("run", folder, "--sparsity", "0.5", *DATA, "--method", "magnitude", "--run-dir")
    assert lampctl(*call, "a").code == 0
    same["lm_head.weight"][0, 0] += 1
    save_file(same, folder / "model.safetensors", {"format": "pt"})
    answer = lampctl(*call, "b")
    assert answer.code == 2
    assert "set tie_word_embeddings to false" in answer.err


def test_missing_model_names_the_command_to_resume(lampctl, tmp_path):
    folder = save(tmp_path / "m", "llama")
    assert lampctl("init", folder, "--sparsity", "0.5", *DATA, "--run-dir", "r").code == 0
    folder.rename(tmp_path / "elsewhere")
    answer = lampctl("resume", "r")
    assert answer.code == 5
    assert "a symbolic link will do" in answer.err
    folder.symlink_to(tmp_path / "elsewhere")
    assert lampctl("resume", "r").code == 0


def test_resume_without_argument_skips_damaged_runs(lampctl, model):
    call = ("init", model, "--sparsity", "0.5", "--method", "magnitude", "--evaluate", "", "--run-dir")
    assert lampctl(*call, "runs/good").code == 0
    assert lampctl(*call, "runs/bad").code == 0
    Path("runs/bad/run.json").write_text("{")
    answer = lampctl("resume")
    assert answer.code == 0, answer.err
    assert "passing over" in answer.err
    assert Path("runs/good/model").is_dir()


def test_retries_of_the_hub_are_not_shown_and_the_user_can_show_them():
    code = (
        "import sys; from lampctl.app import main; sys.argv = ['lampctl', '--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "from huggingface_hub.utils import logging; print(logging.get_verbosity())"
    )
    for given, level in (({}, logging.ERROR), ({"HF_HUB_VERBOSITY": "info"}, logging.INFO)):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **given}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split()[-1] == str(level), done.stderr
