"""The class of transformers by which users and measurements open a whole model folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

_OF_TEXT = "AutoModelForCausalLM"
_OF_MANY_INPUTS = "AutoModelForMultimodalLM"
_OF_FEATURES = "AutoModel"
# Classes of the image encoders, which AutoModel would open without their heads.
_ENCODERS = re.compile(r"(ViT|Dinov2|CLIP)\w+")


def loader_of(folder: Path, usual: str = _OF_TEXT) -> str:
    """Name of the class whose `from_pretrained` opens the model in a folder with all its towers.

    Args:
        folder: The model folder.
        usual: The class for models of its task.
    """
    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or ()
    except (OSError, ValueError, AttributeError, RecursionError):
        return usual  # whoever opens the folder tells what is wrong with it
    if usual == _OF_FEATURES:
        return next((name for name in map(str, architectures) if _ENCODERS.fullmatch(name)), usual)
    is_multimodal = any(str(name).endswith("ForConditionalGeneration") for name in architectures)
    return _OF_MANY_INPUTS if is_multimodal and usual == _OF_TEXT else usual
