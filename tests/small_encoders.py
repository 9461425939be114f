"""Small image encoders, random but reproducible, as folders of transformers; and pictures to try them on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from tests.small_sam import picture

SIDE = 32
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
_CLIP = {**_SIZES, "intermediate_size": 48}
_TEXT = {**_CLIP, "num_hidden_layers": 2, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
_SQUARE = {"height": SIDE, "width": SIDE}
PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": _SQUARE},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": _SQUARE,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": _SQUARE},
}


def _clip() -> CLIPModel:
    config = CLIPConfig(text_config=_TEXT, vision_config={**_CLIP, "projection_dim": 99}, projection_dim=24)
    return CLIPModel(config)


BUILDERS = {
    "vit": lambda: ViTModel(ViTConfig(**_SIZES, intermediate_size=48)),
    "vit-classifier": lambda: ViTForImageClassification(ViTConfig(**_SIZES, intermediate_size=48, num_labels=5)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_SIZES, mlp_ratio=2)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(**_SIZES, mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2-classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**_SIZES, mlp_ratio=2, num_labels=5)),
    "dinov2-registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_SIZES, mlp_ratio=2, num_register_tokens=4)
    ),
    "clip-vision": lambda: CLIPVisionModel(CLIPVisionConfig(**_CLIP)),
    "clip-vision-projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**_CLIP, projection_dim=24)),
    "clip": _clip,
}
# What lampctl refuses.
REFUSED = {
    "siglip-vision": lambda: SiglipVisionModel(SiglipVisionConfig(**_CLIP)),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Random weights everywhere, in biases and norms, too."""
    torch.manual_seed(seed)
    model: PreTrainedModel = {**BUILDERS, **REFUSED}[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def save(folder: Path, name: str, seed: int = 0) -> Path:
    """As a folder with its image processor."""
    build(name, seed).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name.partition("-")[0]]))
    return folder


@torch.no_grad()
def features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """What a model of transformers, opened from a folder, says of pictures: (N, F)."""
    if isinstance(model, CLIPModel):
        found = model.get_image_features(pixel_values=pixels)
        return found if isinstance(found, torch.Tensor) else found.pooler_output
    if isinstance(model, CLIPVisionModelWithProjection):
        return model(pixel_values=pixels).image_embeds
    if isinstance(model, CLIPVisionModel):
        return model(pixel_values=pixels).pooler_output
    base = getattr(model, model.base_model_prefix, model)
    return base(pixel_values=pixels).last_hidden_state[:, 0]


def pictures(folder: Path, count: int = 6) -> Path:
    """A folder as `images:DIR` wants it: landscape, portrait, grey, and smaller than a model's pictures."""
    folder.mkdir(parents=True)
    for number in range(count):
        height, width = ((48, 64), (71, 40), (20, 33))[number % 3]
        image = Image.fromarray(picture(number, height, width)[0])
        (image.convert("L") if number == 4 else image).save(folder / f"{number:03d}.png")
    return folder
