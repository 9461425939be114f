"""Which class of transformers a model folder is of, built on `meta`; where its text tower and its other towers are."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from stages.errors import UsageError
from stages.machine.hub import reason_of
from stages.models.base import ModelFolder

# Behind the reason why a model is refused.
CAN_BE_PRUNED = (
    "what can be pruned are decoder-only language models, also inside multimodal ones, and the image encoders ViT, "
    "DINOv2, CLIP and Segment Anything"
)
_OTHER_INPUTS = ("image", "video", "audio")

# `init_empty_weights` replaces a method of `nn.Module` and puts back what it found: two threads must not overlap.
_BUILDING = threading.RLock()


def build_empty(folder: ModelFolder) -> PreTrainedModel:
    """The folder's model on `meta`: a language model, or a multimodal one around a language model.

    A multimodal model whose text tower is a class of its own in transformers, which reads the same files, is opened as
    that class; another one as a whole.

    Raises:
        UsageError: It is no decoder-only language model, and has none as its text tower; or it is quantized.
    """
    config = _read_config(folder)
    with without_weights():
        if _is_causal(config, folder):
            options = {"dtype": torch.float32, "trust_remote_code": folder.trusts_code}
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    return model


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Build models on `meta`. Buffers that no checkpoint holds (rotary frequencies, embedding scales) are computed.

    Weights are marked as initialized for transformers: to draw them, though on `meta`, took two thirds of the time.

    Only models of the calling thread are built so: other threads may build and load models meanwhile.
    """
    from accelerate import init_empty_weights

    builder = threading.get_ident()
    with _BUILDING:
        usual = nn.Module.register_parameter
        with init_empty_weights(include_buffers=False):
            on_meta = nn.Module.register_parameter

            def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
                if threading.get_ident() != builder:
                    usual(module, name, param)
                    return
                on_meta(module, name, param)
                if param is not None:
                    module._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]

            nn.Module.register_parameter = register_parameter  # type: ignore[assignment, method-assign]
            yield


class AbsentTower(nn.Module):
    """Stands where a tower was that text does not pass. Some models ask it for its device and dtype all the same."""

    device = torch.device("cpu")
    dtype = torch.float32


def text_tower(model: PreTrainedModel) -> str:
    """The path, with a dot at its end, of the module that is the language model; empty: the whole model is one."""
    if model.config.get_text_config() is model.config:
        return ""
    tower = model.get_decoder()
    return next(f"{path}." for path, module in model.named_modules() if module is tower)


def other_towers(model: PreTrainedModel) -> tuple[str, ...]:
    """The paths of the towers for images, video and sound, which text does not pass."""
    if not text_tower(model):
        return ()
    found = {id(model.get_encoder(modality=modality)) for modality in _OTHER_INPUTS} - {id(model)}
    return tuple(path for path, module in model.named_modules() if id(module) in found)


def _read_config(folder: ModelFolder) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.trusts_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{folder.name} comes with Python code of its own, which is not run unless you say "
                "--trust-remote-code: read it first"
            ) from error
        raise UsageError(f"{folder.name}: transformers cannot read its config.json ({reason_of(error)})") from error
    is_known = _is_causal(config, folder) or _has_text_tower(config)
    if not is_known or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{folder.name} is a {config.model_type} model, no decoder-only language model: {CAN_BE_PRUNED}"
        )
    if _is_encoder(config):
        raise UsageError(
            f"{folder.name} is a {config.model_type} model in which each token sees those after it: this is an "
            f"encoder; {CAN_BE_PRUNED}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{folder.name} is quantized: name the original model")
    return config


def _is_causal(config: PreTrainedConfig, folder: ModelFolder) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    is_own = folder.trusts_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    return is_own or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a class that is a decoder only with `is_decoder` (BERT) is none here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False


def _has_text_tower(config: PreTrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    text = config.get_text_config()
    is_decoder = text is not config and not getattr(text, "is_encoder_decoder", False)
    return is_decoder and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
