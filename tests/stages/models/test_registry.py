"""Every model family: it passes the conformance kit, and a folder is opened by the one that recognises it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.models.decoder_family import DecoderFamily
from stages.models.registry import MODEL_FAMILIES, family_of, open_model
from stages.models.resolve import resolve
from stages.testing.models import check_model_family
from tests import small_models, small_sam


def language(path, family="llama-gqa"):
    folder = small_models.save(path, family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, small_models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    return resolve(str(folder)), ids, lambda inputs: reference(inputs, use_cache=False).logits


def vision(path):
    folder, side = small_sam.save(path), small_sam.SIZES.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return resolve(str(folder)), pixels, small_sam.build().image_encoder


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_decoders_pass_the_kit(tmp_path, family):
    check_model_family("decoder", *language(tmp_path / "m", family))


def test_segment_anything_passes_the_kit(tmp_path):
    check_model_family("sam", *vision(tmp_path / "m"))


def test_every_family_has_a_model_in_these_tests():
    assert set(MODEL_FAMILIES.names) == {"decoder", "sam", "image-encoder"}  # the last one: test_image_encoder.py


def test_the_kit_sees_a_chain_that_differs(tmp_path):
    folder, ids, forward = language(tmp_path / "m")
    with pytest.raises(AssertionError, match="the block chain differs"):
        check_model_family("decoder", folder, ids, lambda inputs: forward(inputs) + 1e-6)


class Inverted(DecoderFamily):
    name = "inverted"
    title = "inverted models"
    help = "Models whose configuration says model_type inverted."
    is_fallback = False

    @classmethod
    def recognises(cls, config):
        return config.get("model_type") == "inverted"

    @classmethod
    def open(cls, folder):
        return f"opened {folder.path.name}"


def test_a_family_of_another_package_is_asked_before_the_fallback(tmp_path):
    folder, _, _ = language(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "inverted"}))
    assert family_of(folder) is DecoderFamily
    MODEL_FAMILIES.register("inverted", Inverted)
    try:
        assert open_model(folder) == "opened m"
    finally:
        MODEL_FAMILIES.unregister("inverted")
