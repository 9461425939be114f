"""Weights that the files hold in pieces: each piece is an entry of its own, and the module computes the same."""

import copy

import pytest
import torch
from torch import nn
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from stages.models.weight_pieces import separate_pieces

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
