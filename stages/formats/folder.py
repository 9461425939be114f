"""The export format of a run's export step: a model folder."""

from __future__ import annotations

from stages.formats.base import ExportFormat


class FolderFormat(ExportFormat):
    """Safetensors, configuration and tokenizer, opened by `from_pretrained`, with the pruning masks in a folder."""

    name = "folder"
    title = "model folder"
    help = "the export step of the run, a folder for transformers."
