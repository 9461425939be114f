"""Tasks, models and data by name: the one place that knows all kinds of each."""

from __future__ import annotations

import json

from stages.models.base import BlockModel, ModelFolder
from stages.tasks.base import Task


def task_named(name: str) -> Task:
    """The task that a model says it is for."""
    if name == "vision":
        from stages.tasks.segmentation import Vision

        return Vision()
    from stages.tasks.language import Language

    return Language()


def open_model(folder: ModelFolder) -> BlockModel:
    """The model in `folder`, with no weight read yet. Raises UsageError for what cannot be pruned here."""
    if _model_type(folder) == "sam":
        from stages.models.sam.encoder import SamEncoder

        return SamEncoder(folder)
    from stages.models.decoder import open_model as open_decoder

    return open_decoder(folder)


def _model_type(folder: ModelFolder) -> str | None:
    """What the configuration says; the decoder's reader explains one that cannot be read."""
    try:
        settings = json.loads((folder.path / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return settings.get("model_type") if isinstance(settings, dict) else None
