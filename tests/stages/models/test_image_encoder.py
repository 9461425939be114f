"""Image encoders of transformers: every kind of folder passes the kit, and what cannot be pruned is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, SiglipVisionConfig

from stages.errors import UsageError
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.testing.models import check_model_family
from tests import small_encoders
from tests.small_encoders import SIDE

pytestmark = pytest.mark.long


def pixels(side: int = SIDE) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def edited(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", small_encoders.BUILDERS)
def test_image_encoders_pass_the_kit(tmp_path, name):
    folder = small_encoders.save(tmp_path / "m", name)
    reference = type(small_encoders.build(name)).from_pretrained(folder, dtype=torch.float32).eval()
    check_model_family(
        "image-encoder", resolve(str(folder)), pixels(), lambda inputs: small_encoders.features(reference, inputs)
    )
    model = open_model(resolve(str(folder)))
    inner = {"gate", "up"} if name == "dinov2-swiglu" else {"fc1"}
    assert {layer.role for layer in model.layers(1)} == {"q", "k", "v", "out", "fc2", *inner}
    heads = ("text_model.", "text_projection.", "logit_scale", "classifier.", "pooler.")
    assert all(key.startswith(heads) for key in model.unused_weights())
    assert bool(model.unused_weights()) == (name in ("vit", "vit-classifier", "dinov2-classifier", "clip"))


def test_dinov2_takes_pictures_of_another_size_than_its_positions_were_trained_for(tmp_path):
    folder = small_encoders.save(tmp_path / "m", "dinov2")
    edited(folder, "preprocessor_config.json", crop_size={"height": 24, "width": 24})
    reference = small_encoders.build("dinov2")
    check_model_family(
        "image-encoder", resolve(str(folder)), pixels(24), lambda inputs: small_encoders.features(reference, inputs)
    )
    assert open_model(resolve(str(folder))).fixed_tokens == 3 * 3 + 1


def test_clip_vision_folders_of_older_versions_have_a_prefix(tmp_path):
    folder = small_encoders.save(tmp_path / "m", "clip-vision")
    weights = load_file(folder / "model.safetensors")
    save_file({f"vision_model.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    reference = small_encoders.build("clip-vision")
    check_model_family(
        "image-encoder", resolve(str(folder)), pixels(), lambda inputs: small_encoders.features(reference, inputs)
    )


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("preprocessor_config.json", {"size": {"height": 40, "width": 40}}, "gives pictures of 40x40 pixels"),
        ("preprocessor_config.json", {"image_processor_type": "LevitImageProcessor"}, "known are those of ViT"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 32}}, "pictures of different sizes"),
        ("preprocessor_config.json", {"size": {"height": "x", "width": 32}}, "cannot be used"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "for the three channels"),
        ("preprocessor_config.json", {"do_flip_channel_order": True}, "asks for do_flip_channel_order"),
        ("config.json", {"num_hidden_layers": 2}, "more blocks than the 2"),
        ("config.json", {"num_hidden_layers": 0}, "has no blocks"),
        ("config.json", {"intermediate_size": 40}, "has shape"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
    ],
)
def test_folders_that_cannot_be_pruned_are_refused_by_name(tmp_path, file, changes, says):
    folder = small_encoders.save(tmp_path / "m", "vit")
    edited(folder, file, **changes)
    with pytest.raises(UsageError, match=says):
        open_model(resolve(str(folder)))


def test_missing_weights_and_a_missing_image_processor_are_named(tmp_path):
    folder = small_encoders.save(tmp_path / "m", "vit")
    edited(folder, "config.json", num_hidden_layers=4)
    with pytest.raises(UsageError, match="lacks 16 weights of a ViTModel"):
        open_model(resolve(str(folder)))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no preprocessor_config\.json"):
        open_model(resolve(str(folder)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SiglipVisionConfig(), "is a siglip_vision_model model, no decoder-only language model"),
        (BertConfig(), "is a bert model in which each token sees those after it: this is an encoder"),
    ],
)
def test_other_encoders_are_refused_with_the_list_of_those_that_can_be_pruned(tmp_path, config, says):
    """Also without a head: of a BertModel, that of a language model is not missing."""
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"{says}.* the image encoders ViT, DINOv2, CLIP and Segment Anything$"):
        open_model(resolve(str(tmp_path)))
