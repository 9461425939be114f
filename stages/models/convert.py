"""Models that are no safetensors, converted once into the user's cache: pickles and GGUF.

Pickles are read with weights_only: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

from stages.errors import ResourceError, UsageError
from stages.formats.checkpoint_files import INDEX, files_of_weights, serialized
from stages.formats.disk_errors import reading
from stages.formats.file_digest import digest_file
from stages.models.companion_files import companion_files
from stages.models.converted_folders import cached, converted, with_files

log = logging.getLogger(__name__)

PICKLES = "pytorch_model*.bin"


def from_pickles(folder: Path) -> Path:
    """A folder in the cache with the same model as safetensors, under the same names, and its other files as they are.

    Raises ResourceError for a file that is no pickle of tensors.
    """
    files = pickle_files(folder)
    digests = [digest_file(path).sha256 for path in files]
    with converted(hashlib.sha256("\n".join(["pickles", *digests]).encode()).hexdigest()) as (target, is_new):
        if is_new:
            log.info("converting %s to safetensors, once", folder)
            _write_tensors(files, target)
    return with_files(cached(target), companion_files(folder))


def _write_tensors(files: Iterable[Path], target: Path) -> None:
    """The tensors of each pickle as one safetensors file, and their index."""
    import torch

    weight_map: dict[str, str] = {}
    for number, path in enumerate(files):
        try:
            # Not mapped: a mapped file that goes away ends the process by SIGBUS.
            with reading(path), path.open("rb") as file:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ResourceError(f"{path} cannot be read as a pickle of plain tensors: {reason}") from error
        name = f"model-{number:05d}.safetensors"
        whole = {k: t for k, t in tensors.items() if isinstance(t, torch.Tensor)}
        with (target / name).open("xb") as out:
            out.writelines(serialized(whole, {"format": "pt"}))
        weight_map.update(dict.fromkeys(whole, name))
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickle_files(folder: Path) -> list[Path]:
    """The pickles that transformers would load. Raises ResourceError if one that the index names is missing."""
    names, _ = files_of_weights(folder, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return sorted(folder.glob(PICKLES)) if names is None else [folder / name for name in names]


def from_gguf(fetch: Callable[[], Path], sha256: str | None = None) -> Path:
    """A folder in the cache with the model of a GGUF file, dequantized to fp32, and its tokenizer.

    fetch: gives the file, and is called only if it has not been converted yet. sha256: of the file, if known.
    Raises UsageError for an architecture that transformers does not read from GGUF.
    """
    digest = sha256 or digest_file(fetch()).sha256
    with converted(digest) as (target, is_new):
        if is_new:
            path = fetch()
            log.info("converting %s to safetensors, once", path.name)
            try:
                _write_gguf_model(path, target)
            except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(f"{path}: transformers cannot read this GGUF file ({reason})") from error
    return cached(target)


def _write_gguf_model(path: Path, target: Path) -> None:
    from transformers.utils import logging as tf_logging

    bars = tf_logging.is_progress_bar_enabled()
    tf_logging.disable_progress_bar()  # ours is the only progress that is shown
    try:
        _convert_gguf(path, target)
    finally:
        if bars:
            tf_logging.enable_progress_bar()


def _convert_gguf(path: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save a model read from GGUF: "quantized with gguf and is not serializable". A fresh
    # model of the same configuration has nothing to do with GGUF.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(read.config).from_dict(settings)
    config.dtype = torch.float32
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
