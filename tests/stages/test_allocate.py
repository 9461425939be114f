"""Data-dependent budgets: shares of outlying weights, and the counts computed from them."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from stages.allocate import outlier_shares
from stages.capture import capture
from stages.in_memory import ListScratch, ListStream
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.sparsity.budget import BudgetError, LayerShape, allocate
from stages.sparsity.owl import budget_by_outliers
from tests.blocks import context_of
from tests.small_models import VOCAB, save


@pytest.mark.parametrize("family", ["llama-gqa", "opt-350m", "gpt2"])
def test_shares_are_those_of_the_whole_model(tmp_path, family):
    folder = save(tmp_path / "m", family)
    model = open_model(resolve(str(folder)))
    inputs, hidden = ListStream(3, (16,), torch.long), ListStream(3, (16, 32), torch.float32)
    for i in range(3):
        inputs.write(i, torch.randint(4, VOCAB, (16,), generator=torch.Generator().manual_seed(i)))
    context = context_of(model, inputs)
    capture(context, hidden, None)
    left_out = model.layers(1)[0].name
    prunable = {layer.name for i in range(3) for layer in model.layers(i)} - {left_out}
    shares = outlier_shares(context, hidden, prunable, ListScratch())

    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name in prunable:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for i in range(3):
            whole(inputs[i][None], use_cache=False)
    for i in range(3):
        outlying = size = 0
        for layer in model.layers(i):
            if layer.name in prunable:
                weight = whole.get_submodule(layer.name).weight
                weight = weight.T if layer.transposed else weight
                scores = weight.abs() * torch.cat(seen[layer.name]).norm(dim=0)
                outlying += int((scores > 5 * scores.mean()).sum())
                size += scores.numel()
        assert shares[i] == pytest.approx(outlying / size, abs=2 / size)
    assert any(shares)


@dataclass(frozen=True)
class Case:
    blocks: list
    shares: list


@st.composite
def cases(draw):
    num_blocks = draw(st.integers(1, 6))
    blocks = [
        [LayerShape(f"{i}.{k}", None, draw(st.integers(1, 9)), draw(st.integers(1, 9))) for k in range(2)]
        for i in range(num_blocks)
    ]
    shares = draw(st.lists(st.floats(0, 1), min_size=num_blocks, max_size=num_blocks))
    return Case(blocks, shares)


def total_masked(sparsity, total):
    """In exact arithmetic: 0.7 * 85 is 59.5, and the float result is smaller."""
    return round(Fraction(str(sparsity)) * total)


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([0.1, 0.5, 0.7, 0.95]), st.sampled_from([0.01, 0.08, 0.4]))
def test_the_total_is_exact_and_more_outliers_lose_less(case, sparsity, spread):
    budget, used = budget_by_outliers(case.blocks, case.shares, spread, sparsity, 1.0, 0.0)
    total = sum(layer.size for block in case.blocks for layer in block)
    assert sum(block.num_masked for block in budget) == total_masked(sparsity, total)
    assert all(0 <= layer.num_masked <= layer.size for block in budget for layer in block.layers)
    assert 0 <= used <= spread
    for a, share_a in zip(budget, case.shares, strict=True):
        for b, share_b in zip(budget, case.shares, strict=True):
            if share_a > share_b:  # up to one weight of rounding in each
                assert a.num_masked / a.size <= b.num_masked / b.size + 1 / a.size + 1 / b.size


def test_the_interval_is_as_wide_as_the_spread_says_and_alpha_acts_on_top():
    blocks = [[LayerShape(f"b.{i}", None, 100, 100)] for i in range(3)]
    budget, used = budget_by_outliers(blocks, [0.03, 0.01, 0.02], 0.05, 0.7, 1.0, 0.0)
    assert used == 0.05
    assert [block.num_masked for block in budget] == [6500, 7500, 7000]
    budget, _ = budget_by_outliers(blocks, [0.03, 0.01, 0.02], 0.05, 0.7, 0.8, 0.0)
    assert [block.num_masked for block in budget] == [7200, 8200, 5600]
    assert budget_by_outliers(blocks, [0.1, 0.1, 0.1], 0.05, 0.7, 0.8, 0.0)[0] == allocate(blocks, 0.7, 0.8, 0.0)


def test_a_spread_that_does_not_fit_is_made_smaller_and_a_budget_that_cannot_be_is_refused():
    blocks = [[LayerShape(f"b.{i}", None, 10, 10)] for i in range(2)]
    budget, used = budget_by_outliers(blocks, [0.0, 0.1], 0.4, 0.9, 1.0, 0.0)
    assert used == pytest.approx(0.08)
    assert [block.num_masked for block in budget] == [98, 82]
    with pytest.raises(BudgetError, match="alpha"):
        budget_by_outliers(blocks, [0.0, 0.1], 0.4, 0.9, 0.5, 0.0)
