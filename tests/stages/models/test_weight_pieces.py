"""Weights that transformers joins or splits when it loads a model: each has its place in the files."""

import copy

import pytest
import torch
from torch import nn
from transformers.core_model_loading import Chunk, Concatenate, Split, Transpose, WeightConverter, WeightRenaming

from stages.models.weight_pieces import place_rows, separate_pieces

PIECES = {
    f"old.layers.0.{name}_conv1d.weight": torch.randn(rows, 1, 4) for name, rows in (("q", 6), ("k", 6), ("v", 3))
}
CONVERTER = WeightConverter(
    [f"{name}_conv1d.weight" for name in "qkv"], "conv1d.weight", operations=[Concatenate(dim=0)]
)
RENAMING = WeightRenaming(r"^old\.", "")


def skeleton(layer=None):
    """A model on `meta` whose block holds one layer."""
    block = nn.Module()
    block.conv1d = layer if layer is not None else nn.Conv1d(15, 15, 4, groups=15, bias=False, device="meta")
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


def separated(model, stored=PIECES, transforms=(RENAMING, CONVERTER)):
    return separate_pieces(model, stored, transforms, "model", lambda key: tuple(stored[key].shape))


def test_a_packed_convolution_consists_of_the_tensors_of_the_files():
    model = skeleton()
    found = separated(model)
    assert found == {f"layers.0.conv1d.weight_{number}": key for number, key in enumerate(PIECES)}
    assert set(model.state_dict()) == set(found)
    model = copy.deepcopy(model)
    model.load_state_dict({name: PIECES[key] for name, key in found.items()}, assign=True)
    conv, x = model.layers[0].conv1d, torch.randn(2, 15, 9)
    whole = torch.cat(list(PIECES.values()))
    expected = nn.functional.conv1d(x, whole, groups=15)
    assert torch.equal(conv(x), expected)
    conv.requires_grad_(True)
    conv(x).square().sum().backward()
    whole.requires_grad_(True)
    nn.functional.conv1d(x, whole, groups=15).square().sum().backward()
    assert torch.equal(torch.cat([conv.weight_0.grad, conv.weight_1.grad, conv.weight_2.grad]), whole.grad)


def test_pieces_are_in_the_order_of_the_conversion_not_of_the_files():
    found = separated(skeleton(), dict(reversed(PIECES.items())))
    assert found == {f"layers.0.conv1d.weight_{number}": key for number, key in enumerate(PIECES)}


@pytest.mark.parametrize(
    "case",
    [
        {"stored": dict(list(PIECES.items())[:2])},
        {"stored": {**PIECES, "old.layers.0.v_conv1d.weight": torch.randn(4, 1, 4)}},
        {"model": skeleton(nn.Linear(4, 15, device="meta"))},
        {"transforms": (RENAMING,)},
        {
            "transforms": (
                RENAMING,
                WeightConverter(["q_conv1d.weight"], "conv1d.weight", operations=[Concatenate(dim=1)]),
            )
        },
    ],
    ids=["a piece is missing", "another number of rows", "a linear layer", "no conversion", "another conversion"],
)
def test_what_does_not_fit_stays_as_it_is(case):
    model, changes = case.get("model", skeleton()), {name: case[name] for name in case if name != "model"}
    names = set(model.state_dict())
    assert separated(model, **changes) == {}
    assert set(model.state_dict()) == names


WANTED = {
    "model.layers.0.self_attn.q_proj.weight": (6, 5),
    "model.layers.0.self_attn.k_proj.weight": (2, 5),
    "model.layers.0.self_attn.v_proj.weight": (2, 5),
    "model.layers.0.self_attn.q_proj.bias": (6,),
    "model.layers.0.self_attn.k_proj.bias": (2,),
    "model.layers.0.self_attn.v_proj.bias": (2,),
}
JOINED = {
    "layers.0.attention.query_key_value.weight": torch.randn(10, 5),
    "layers.0.attention.query_key_value.bias": torch.randn(10),
}
ATTENTION = WeightRenaming(r"\.attention\.", ".self_attn.")
SPLIT = WeightConverter("query_key_value", ["q_proj", "k_proj", "v_proj"], operations=[Split(dim=0)])


def rows_placed(stored, transforms, wanted=WANTED):
    return place_rows(stored, wanted, transforms, "model", lambda key: tuple(stored[key].shape))


def test_joined_projections_are_split_as_transformers_splits_them():
    parts = rows_placed(JOINED, [ATTENTION, SPLIT])
    assert parts.keys() == WANTED.keys()
    for kind in ("weight", "bias"):
        key = f"layers.0.attention.query_key_value.{kind}"
        for name, rows in zip("qkv", torch.split(JOINED[key], [6, 2, 2]), strict=True):
            part = parts[f"model.layers.0.self_attn.{name}_proj.{kind}"]
            assert part.key == key
            assert torch.equal(part.of(JOINED[key]), rows)


def test_equal_chunks_are_placed_too():
    wanted = {f"model.layers.0.mlp.{name}_proj.weight": (4, 3) for name in ("gate", "up")}
    stored = {"model.layers.0.mlp.weights_in.weight": torch.randn(8, 3)}
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    parts = rows_placed(stored, [WeightConverter("mlp.weights_in.weight", names, operations=[Chunk(dim=0)])], wanted)
    whole = stored["model.layers.0.mlp.weights_in.weight"]
    gate, up = (parts[name].of(whole) for name in wanted)
    assert torch.equal(gate, whole[:4])
    assert torch.equal(up, whole[4:])


@pytest.mark.parametrize(
    ("stored", "transforms"),
    [
        ({key: tensor[:9] for key, tensor in JOINED.items()}, [ATTENTION, SPLIT]),
        (JOINED, [SPLIT]),
        (JOINED, [ATTENTION, WeightConverter("query_key_value", ["q_proj", "no_proj"], operations=[Split(dim=0)])]),
        (JOINED, [ATTENTION, WeightConverter("query_key_value", ["q_proj", "k_proj"], operations=[Chunk(dim=1)])]),
        (JOINED, [ATTENTION, WeightConverter("query_key_value", ["q_proj"], operations=[Transpose(0, 1)])]),
        ({name: torch.zeros(shape) for name, shape in WANTED.items()}, [ATTENTION, SPLIT]),
    ],
    ids=["too few rows", "another name", "a weight is unknown", "columns", "another conversion", "not joined"],
)
def test_what_is_not_joined_like_this_has_no_place(stored, transforms):
    assert rows_placed(stored, transforms) == {}
