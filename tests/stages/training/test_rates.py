"""Learning rates relative to the size of each tensor."""

import math

import pytest
import torch

from stages.errors import UsageError
from stages.training.kept_weights import KeptAdam
from stages.training.rates import Rate


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [
        (1e-3, Rate(1e-3), "0.001"),
        ("2e-3", Rate(2e-3), "0.002"),
        ("1%", Rate(0.01, is_relative=True), "1%"),
        (" 0.25 %", Rate(0.0025, is_relative=True), "0.25%"),
    ],
)
def test_a_rate_is_read_and_shown(text, rate, shown):
    assert Rate.parse(text) == rate
    assert str(rate) == shown
    assert Rate.parse(shown) == rate


@pytest.mark.parametrize("text", ["", "%", "0", "0%", "-1%", "nan", "nan%", "inf", "1e9", "fast", "1%%", "5 % of it"])
def test_what_is_no_rate_is_refused_with_two_that_are(text):
    with pytest.raises(UsageError, match=r"1e-3.*1%"):
        Rate.parse(text)


def test_an_absolute_rate_is_the_same_for_every_tensor():
    linear = torch.nn.Linear(3, 2)
    assert Rate(1e-3).factors(dict(linear.named_parameters())) == {"weight": 1.0, "bias": 1.0}


def test_a_relative_rate_follows_each_tensor_and_zeros_follow_their_module():
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    with torch.no_grad():
        block.a.weight.fill_(0.5)
        block.a.bias.zero_()
        block.b.weight.copy_(torch.tensor([[3.0, 0], [0, 4]]))
        block.b.bias.fill_(-2)
    parameters = {**dict(block.named_parameters()), "scale": torch.zeros(7)}
    overall = math.sqrt((6 * 0.25 + 25 + 8) / (6 + 2 + 4 + 2 + 7))
    assert Rate(0.01, is_relative=True).factors(parameters) == pytest.approx(
        {"a.weight": 0.5, "a.bias": 0.5, "b.weight": 2.5, "b.bias": 2.0, "scale": overall}
    )


def test_a_model_of_other_units_takes_the_same_steps():
    """Weights 100 times as small, gradients 100 times as large: the relative changes of a step are equal."""
    torch.manual_seed(0)
    weight, gradient, kept = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 4) > 0.5
    changes = {}
    for scale in (1.0, 0.01):
        linear = torch.nn.Linear(4, 6, bias=False)
        with torch.no_grad():
            linear.weight.copy_(weight * kept * scale)
        adam = KeptAdam(linear, {"weight": kept}, Rate(0.01, is_relative=True))
        before = linear.weight.detach().clone()
        linear.weight.grad = gradient * kept / scale
        adam.step(0.01)
        changes[scale] = (linear.weight.detach() - before) / scale
    assert changes[1.0].abs().max() > 1e-3
    torch.testing.assert_close(changes[0.01], changes[1.0], rtol=1e-4, atol=1e-7)


def test_factors_are_those_of_the_first_weights_after_a_resume():
    linear = torch.nn.Linear(4, 6)
    kept, rate = {"weight": torch.ones(6, 4, dtype=torch.bool)}, Rate(0.01, is_relative=True)
    adam = KeptAdam(linear, kept, rate)
    stored = adam.tensors()
    with torch.no_grad():
        linear.weight.mul_(3)
    resumed = KeptAdam(linear, kept, rate)
    assert resumed.tensors()["adam.factor.weight"] != stored["adam.factor.weight"]
    resumed.load(stored)
    assert resumed.tensors()["adam.factor.weight"] == stored["adam.factor.weight"]
