"""A folder of quantized weights, dequantized once into a folder of plain ones in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.errors import UsageError
from stages.formats.checkpoint_files import INDEX, WeightFiles, serialized
from stages.formats.file_digest import digest_file
from stages.formats.tensor_reading import PLAIN_DTYPES
from stages.models.companion_files import companion_files
from stages.models.converted_folders import cached, converted, with_files
from stages.models.quantized.base import QuantizedFormat
from stages.models.quantized.compressed_tensors import CompressedTensors
from stages.models.quantized.fp8 import Fp8
from stages.models.quantized.gptq import Awq, Gptq

log = logging.getLogger(__name__)

_FORMATS: dict[str, type[QuantizedFormat]] = {found.method: found for found in (Fp8, CompressedTensors, Gptq, Awq)}
_KEYS = ("quantization_config", "compression_config")
# Raised by one when a conversion changes what it writes.
_VERSION = 2
_SHARD_BYTES = 1_000_000_000
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def plain_folder(folder: Path) -> Path:
    """The folder itself if its weights are plain; else one in the cache with the same model, dequantized.

    Every other tensor is taken over as it is, and so is every file beside the weights. Weights are written in the
    dtype that config.json names (bfloat16 if it names none), one in memory at a time.

    Raises:
        UsageError: It is quantized in a way that is not read here, or tensors and config.json do not go together; the
            message names the way and what to do.
        ResourceError: A file is missing, or the cache has no room.
    """
    config = _config(folder)
    settings = _quantization(folder, config)
    if settings is None:
        return folder
    chosen = _format_of(folder, settings)
    weights = WeightFiles(folder)
    coded = chosen.parts(weights)
    if not coded:
        raise UsageError(
            f"{folder}: config.json says that it is quantized by {chosen.method}, but its files hold no weight of that "
            "kind: take quantization_config out of config.json if they are plain"
        )
    dtype = _dtype(config)
    with converted(_digest(folder, weights, settings, dtype)) as (target, is_new):
        if is_new:
            _require_fitting(folder, weights, chosen, coded)
            log.info("dequantizing %s (%s), once", folder, chosen.method)
            _write(target, _dense_tensors(folder, weights, chosen, coded, dtype))
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    others = {**dict(companion_files(folder)), "config.json": (json.dumps(plain, indent=2) + "\n").encode()}
    return with_files(cached(target), others.items())


def _config(folder: Path) -> dict[str, Any]:
    """The contents of config.json; empty if it cannot be read: whoever opens the model explains why."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _quantization(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    found = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UsageError(f"{folder}: the quantization_config of its config.json is {type(found).__name__}, no mapping")
    return {"quant_method": "compressed-tensors", **found} if "config_groups" in found else found


def _format_of(folder: Path, settings: Mapping[str, Any]) -> QuantizedFormat:
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "an unknown method")
    if not isinstance(method, str):
        raise UsageError(f"{folder}: quant_method {method!r} in its config.json is no name")
    if method not in _FORMATS:
        raise UsageError(
            f"{folder} is quantized by {method}, and only {', '.join(_FORMATS)} are read here: name the original "
            "model, or save a plain copy where transformers can make one (from_pretrained, model.dequantize(), "
            "save_pretrained)"
        )
    try:
        return _FORMATS[method].of(settings)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{folder}: the quantization_config of its config.json cannot be read ({error!r})") from error


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the plain weights."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    named = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "bfloat16")
    return _DTYPES.get(str(named).removeprefix("torch."), torch.bfloat16)


def _digest(folder: Path, weights: WeightFiles, settings: Mapping[str, Any], dtype: torch.dtype) -> str:
    """What tells the dequantized weights from others: all that they are computed from."""
    files = [f"{name}:{digest_file(folder / name).sha256}" for name in weights.filenames]
    listing = [f"dequantized {_VERSION}", json.dumps(settings, sort_keys=True), str(dtype), *files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _require_fitting(
    folder: Path, weights: WeightFiles, chosen: QuantizedFormat, coded: Mapping[str, Mapping[str, str]]
) -> None:
    """Raise UsageError where tensors of a weight do not go together, before one of them is dequantized."""
    for name, parts in coded.items():
        tensors = {
            part: weights.load(key)
            if part in chosen.deciding
            else torch.empty(weights.shape(key), dtype=weights.dtype(key), device="meta")
            for part, key in parts.items()
        }
        try:
            chosen.dense(tensors)
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise UsageError(
                f"{folder}: {name} cannot be dequantized ({reason}): its tensors and config.json do not go together"
            ) from error


def _dense_tensors(
    folder: Path,
    weights: WeightFiles,
    chosen: QuantizedFormat,
    coded: Mapping[str, Mapping[str, str]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain model, by its name."""
    consumed = {key for parts in coded.values() for key in parts.values()}
    for name, parts in coded.items():
        yield name, chosen.dense({part: weights.load(key) for part, key in parts.items()}).to(dtype)
    for key in weights.keys:
        if key in consumed or key.rpartition(".")[2] in chosen.dropped:
            continue
        if weights.dtype(key) not in PLAIN_DTYPES:
            raise UsageError(f"{folder}: {key} is quantized in a way that {chosen.method} does not explain")
        yield key, weights.load(key)


def _write(target: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Files of weights, each no larger than a shard or one tensor, and their index."""
    weight_map: dict[str, str] = {}
    group: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal group, number
        filename = f"model-{number:05d}.safetensors"
        with (target / filename).open("xb") as out:
            out.writelines(serialized(group, {"format": "pt"}))
        weight_map.update(dict.fromkeys(group, filename))
        group, number = {}, number + 1

    for name, tensor in tensors:
        if group and sum(held.nbytes for held in group.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        group[name] = tensor
    flush()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
