"""Segment Anything as a block model: against Meta's own forward, transformers' `SamModel`, and Meta's checkpoints."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel

from stages.errors import ResourceError, UsageError
from stages.models.aliases import SAM_ALIASES, MetaCheckpoint
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.models.sam import checkpoint
from stages.models.sam.checkpoint import sizes_of_state
from stages.models.sam.encoder import SamEncoder
from stages.models.sam.modules import META_SIZES, build_sam, sam_sizes
from tests.small_sam import SIZES, build, save

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "sam")


def opened(path) -> SamEncoder:
    model = open_model(resolve(str(path)))
    assert isinstance(model, SamEncoder)
    return model


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIZES.image_size, SIZES.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_block_by_block_is_the_encoders_own_forward_to_the_last_bit(folder):
    model, images = opened(folder), pixels()
    entry = model.load_ends(CPU, "enter").enter(images)
    hidden = entry.hidden
    assert tuple(hidden.shape[1:]) == model.hidden_shape(tuple(images.shape[1:]))
    for index in range(model.num_blocks):
        hidden = model.run_block(model.load_block(index, CPU), hidden, entry.calls[index])
    embedding = model.load_ends(CPU, "leave").leave(images, hidden)
    assert torch.equal(embedding, build().image_encoder(images))


@torch.no_grad()
def test_masks_are_those_of_metas_decoder_to_the_last_bit(folder):
    sam, images = build(), pixels(1)
    embedding = sam.image_encoder(images)
    points = torch.tensor([[10.0, 20.0], [40.5, 3.0]])
    logits, quality = opened(folder).load_ends(CPU).masks(embedding, points)
    labels = torch.ones(2, 1, dtype=torch.int)
    sparse, dense = sam.prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
    expected, expected_quality = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
    assert torch.equal(logits, expected)
    assert torch.equal(quality, expected_quality)


@torch.no_grad()
def test_transformers_opens_the_folder_and_finds_the_same_masks(folder):
    model, images = opened(folder), pixels(1)
    theirs, info = SamModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    points = torch.tensor([[12.0, 30.0]])
    answer = theirs(pixel_values=images, input_points=points[None, :, None].double(), multimask_output=True)
    ends = model.load_ends(CPU)
    logits, quality = ends.masks(build().image_encoder(images), points)
    torch.testing.assert_close(answer.pred_masks[0, 0], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.iou_scores[0, 0], quality[0], rtol=1e-4, atol=1e-4)


def test_a_folder_that_transformers_saved_opens(tmp_path, folder):
    """Tied weights are stored once, under whichever name."""
    SamModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    state = load_file(tmp_path / "again" / "model.safetensors")
    model = opened(tmp_path / "again")
    assert model.sizes.decoder_norm_eps == SIZES.decoder_norm_eps
    assert model.load_block(0, CPU).attn.qkv.weight.equal(state["vision_encoder.layers.0.attn.qkv.weight"])


@pytest.mark.parametrize("name", META_SIZES)
def test_sizes_of_metas_models_are_read_off_their_weights(name, tmp_path):
    with torch.device("meta"):
        state = build_sam(META_SIZES[name]).state_dict()
    assert sizes_of_state(state, tmp_path) == META_SIZES[name]
    assert sam_sizes(META_SIZES[name].config()) == META_SIZES[name]
    SamConfig(**META_SIZES[name].config())


def test_a_checkpoint_of_metas_form_is_converted_once(tmp_path, folder, monkeypatch):
    path = tmp_path / "mine.pth"
    torch.save(build().state_dict(), path)
    converted = resolve(str(path))
    assert converted.source == "pickle"
    mine, plain = opened(path), opened(folder)
    for name, tensor in plain.load_block(1, CPU).state_dict().items():
        assert torch.equal(mine.load_block(1, CPU).state_dict()[name], tensor)
    assert {k: v.shape for k, v in load_file(converted.path / "model.safetensors").items()} == {
        k: v.shape for k, v in load_file(folder / "model.safetensors").items()
    }
    monkeypatch.setattr(checkpoint, "_read", pytest.fail)
    assert resolve(str(path)).path == converted.path


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_checkpoint_of_a_training_loop_is_unwrapped(tmp_path, folder, key, prefix):
    state = {prefix + name: tensor for name, tensor in build().state_dict().items()}
    saved = state if key is None else {key: state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save(saved, tmp_path / "mine.pth")
    mine = load_file(resolve(str(tmp_path / "mine.pth")).path / "model.safetensors")
    expected = load_file(folder / "model.safetensors")
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())


def test_tensors_beside_segment_anythings_are_named(tmp_path, caplog):
    torch.save({**build().state_dict(), "hq_token": torch.ones(1)}, tmp_path / "mine.pth")
    resolve(str(tmp_path / "mine.pth"))
    assert "left out: ['hq_token']" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "bad.pth"
    torch.save(build().state_dict(), path)
    contents = path.read_bytes()
    path.write_bytes({"truncated": contents[: len(contents) // 2], "text": b"no pickle", "empty": b""}[damage])
    with pytest.raises(ResourceError, match=r"bad\.pth.*truncated"):
        resolve(str(path))


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (pytest.fail, ("code of the pickle was run",))

    torch.save({"x": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(ResourceError, match="plain tensors"):
        resolve(str(tmp_path / "evil.pth"))


def test_other_checkpoints_are_refused(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="no checkpoint of Segment Anything"):
        resolve(str(tmp_path / "other.pth"))
    state = build().state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UsageError, match=r"lacks 1 weights.*iou_token"):
        resolve(str(tmp_path / "part.pth"))


def test_a_published_checkpoint_is_compared_with_its_digest(tmp_path, monkeypatch):
    torch.save(build().state_dict(), tmp_path / "small.pth")
    contents = (tmp_path / "small.pth").read_bytes()
    published = MetaCheckpoint("small.pth", hashlib.sha256(contents).hexdigest(), 1)
    monkeypatch.setitem(SAM_ALIASES, "sam-vit-b", published)
    place = checkpoint.checkpoint_place(published)
    place.parent.mkdir(parents=True)
    place.write_bytes(contents[:-1])
    with pytest.raises(ResourceError, match=r"not the small\.pth that Meta publishes"):
        resolve("sam-vit-b")
    place.write_bytes(contents)
    assert resolve("sam-vit-b").source == "meta"
    assert opened("sam-vit-b").sizes == SIZES


def test_out_of_reach_the_message_says_where_to_put_a_copy(monkeypatch):
    import urllib.error

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(checkpoint.urllib.request, "urlopen", unreachable)
    with pytest.raises(ResourceError, match=r"out of reach \(no route\): put a copy at .*sam_vit_h_4b8939\.pth"):
        resolve("sam-vit-h")


def test_a_folder_without_a_weight_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    del state["vision_encoder.layers.2.mlp.lin1.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ResourceError, match=r"lacks 1 weights .*layers\.2\.mlp\.lin1"):
        opened(folder)


def test_a_configuration_of_another_form_is_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["vision_config"]["use_rel_pos"] = False
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="use_rel_pos = False"):
        opened(folder)


def test_roles_and_layers(folder):
    layers = opened(folder).layers(0)
    assert [(layer.path, layer.role) for layer in layers] == [
        ("attn.qkv", "qkv"),
        ("attn.proj", "out"),
        ("mlp.lin1", "fc1"),
        ("mlp.lin2", "fc2"),
    ]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "layer_norm_eps", 0.1),
        ("vision_config", "num_hidden_layers", 2),
        ("vision_config", "num_hidden_layers", 0),
        ("vision_config", "num_hidden_layers", 10**6),
        ("vision_config", "num_attention_heads", 0),
        ("vision_config", "hidden_size", "32"),
        ("vision_config", "patch_size", 0),
        ("vision_config", "mlp_dim", "x"),
        ("vision_config", "global_attn_indexes", ["a"]),
        ("mask_decoder_config", "hidden_act", "gelu"),
        ("mask_decoder_config", "num_attention_heads", 3),
        ("prompt_encoder_config", "hidden_size", 64),
    ],
)
def test_configurations_that_would_be_ignored_or_crash_are_refused(folder, part, field, value):
    settings = json.loads((folder / "config.json").read_text())
    settings[part][field] = value
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError):
        opened(folder)


def test_odd_checkpoints_are_refused_in_one_line(tmp_path):
    good = build().state_dict()
    odd = {
        "integers": {**good, "mask_decoder.iou_token.weight": good["mask_decoder.iou_token.weight"].int()},
        "numbered": {**good, 7: torch.ones(2)},
        "flat": {**good, "image_encoder.blocks.0.attn.rel_pos_h": torch.ones(3, 0)},
        "other shape": {**good, "image_encoder.neck.0.weight": torch.ones(30, 32, 1, 1)},
    }
    for name, state in odd.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(UsageError):
            resolve(str(tmp_path / f"{name}.pth"))
    torch.save(good, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert opened(tmp_path / "old.pth").sizes == SIZES
    torch.save(good, tmp_path / "flipped.pth")
    contents = bytearray((tmp_path / "flipped.pth").read_bytes())
    contents[len(contents) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(contents)
    with pytest.raises(ResourceError, match="damaged"):
        resolve(str(tmp_path / "flipped.pth"))
