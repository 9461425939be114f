"""Small multimodal models, random but reproducible: a language model as the text tower, and a tower for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.small_models import VOCAB, tokenizer

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# As many blocks as the text tower, and more weights: the blocks are not to be looked for there.
_IMAGES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_IMAGES = {"depth": 2, "hidden_size": 64, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 32}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_SOUND = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "num_mel_bins": 16,
}
_LLAMA4_IMAGES = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}


def _parts() -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """For each family its model type, its text tower's settings, those of its tower for images (or sound)."""
    qwen = {**_TEXT, "rope_parameters": _ROPE}
    linear = {**qwen, "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True}}
    llama4 = {**_TEXT, "intermediate_size_mlp": 64, "num_local_experts": 2}
    gemma4 = {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8}
    gemma4["vocab_size_per_layer_input"] = _TEXT["vocab_size"]
    pixtral = {**_IMAGES, "model_type": "pixtral"}
    return {
        "gemma3": ("gemma3", {**_TEXT, "sliding_window": 8}, _IMAGES),
        "gemma4": ("gemma4", {**_TEXT, **gemma4}, _IMAGES),
        "mistral3": ("mistral3", {**_TEXT, "model_type": "mistral"}, pixtral),
        "ministral3": ("mistral3", {**_TEXT, "model_type": "ministral3"}, pixtral),
        "qwen2.5-vl": ("qwen2_5_vl", qwen, _QWEN_IMAGES),
        "qwen3-vl": ("qwen3_vl", qwen, {**_QWEN_IMAGES, "deepstack_visual_indexes": [0, 1]}),
        "llava": ("llava", {**_TEXT, "model_type": "llama"}, {**_IMAGES, "model_type": "clip_vision_model"}),
        "qwen3.5": ("qwen3_5", {**linear, "layer_types": ["full_attention"] * 2}, _QWEN_IMAGES),
        "llama4": ("llama4", {**llama4, "moe_layers": []}, {**_IMAGES, **_LLAMA4_IMAGES}),
        "llama4-moe": ("llama4", {**llama4, "moe_layers": [1]}, {**_IMAGES, **_LLAMA4_IMAGES}),
        "qwen2-audio": ("qwen2_audio", {**_TEXT, "model_type": "qwen2"}, _SOUND),
    }


# Block by block, mixtures of experts agree with the whole model to rounding, the others to the last bit.
MIXTURES = ("llama4-moe",)
FAMILIES = tuple(family for family in _parts() if family not in MIXTURES)


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder like one from the hub."""
    model_type, text, images = _parts()[family]
    tower = "audio_config" if images is _SOUND else "vision_config"
    config = tf.AutoConfig.for_model(model_type, text_config=dict(text), **{tower: dict(images)})
    torch.manual_seed(0)
    model = tf.AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """The model in a folder, by the class that its config.json names."""
    return tf.AutoModelForMultimodalLM.from_pretrained(folder, **options)
