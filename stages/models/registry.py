"""The model families by name, and how a model folder is opened by the family that recognises it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.models.family import ModelFamily
from stages.registry import Registry

if TYPE_CHECKING:
    from stages.models.base import BlockModel, ModelFolder

MODEL_FAMILIES: Registry[type[ModelFamily]] = Registry(
    "model family",
    {
        "sam": "stages.models.sam.family:SamFamily",
        "image-encoder": "stages.models.image_family:ImageFamily",
        "decoder": "stages.models.decoder_family:DecoderFamily",
    },
    group="lampctl.model_families",
    base="stages.models.family:ModelFamily",
)


def family_of(folder: ModelFolder) -> type[ModelFamily]:
    """The first family that recognises the folder's configuration; fallbacks are asked last."""
    config = _config(folder)
    entries = sorted(MODEL_FAMILIES.entries(), key=lambda family: family.is_fallback)
    return next(family for family in entries if family.recognises(config))


def open_model(folder: ModelFolder) -> BlockModel:
    """The model in a folder. Reads no weight.

    Raises:
        UsageError: The model cannot be pruned, with the reason.
        ResourceError: A file of the model is missing.
    """
    return family_of(folder).open(folder)


def _config(folder: ModelFolder) -> Mapping[str, Any]:
    """The contents of config.json; empty if it cannot be read: the fallback family explains why."""
    try:
        settings = json.loads((folder.path / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
