"""The best weights so far, in memory or on disk: restored bit for bit, without a second copy."""

import pytest
import torch
from torch import nn

from stages.in_memory import ListScratch
from stages.training.best_weights import BestWeights


@pytest.fixture
def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))


def values(block):
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


@pytest.mark.parametrize("spill", [None, ListScratch()], ids=["memory", "disk"])
def test_what_was_taken_last_is_given_back(block, spill):
    first = values(block)
    snapshot = BestWeights(block, spill)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    second = values(block)
    snapshot.restore()
    assert all(torch.equal(tensor, first[name]) for name, tensor in values(block).items())
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(second[name])
    snapshot.save()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(-3)
    assert all(torch.equal(tensor, second[name]) for name, tensor in snapshot.tensors().items())
    snapshot.restore()
    assert all(torch.equal(tensor, second[name]) for name, tensor in values(block).items())


def test_taking_again_uses_the_same_memory(block):
    snapshot = BestWeights(block)
    before = {name: tensor.data_ptr() for name, tensor in snapshot.tensors().items()}
    snapshot.save()
    assert {name: tensor.data_ptr() for name, tensor in snapshot.tensors().items()} == before
