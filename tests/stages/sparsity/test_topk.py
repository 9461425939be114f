"""Exact choice of the smallest scores, against a stable sort."""

import pytest
import torch

from stages.sparsity.topk import kth_by_bisection, smallest, smallest_per_row


def by_sorting(scores, count):
    mask = torch.zeros_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return mask.scatter(1, order, torch.ones_like(order, dtype=torch.bool))


def scores_of(kind):
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(5, 301, generator=generator)
    if kind == "not negative":
        return found.abs()
    if kind == "many equal":
        return (found * 2).round()
    if kind == "all equal":
        return torch.full_like(found, 0.25)
    if kind == "zeros of both signs":
        return torch.where(found > 0.5, found, torch.copysign(torch.zeros_like(found), found))
    if kind == "extreme":
        tiny, largest = torch.finfo(torch.float32).smallest_normal / 8, torch.finfo(torch.float32).max
        found[:, :6] = torch.tensor([torch.inf, -torch.inf, largest, -largest, tiny, -tiny])
    return found


KINDS = ["of both signs", "not negative", "many equal", "all equal", "zeros of both signs", "extreme"]


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_as_many_are_chosen_and_among_equals_the_first(kind):
    scores = scores_of(kind)
    for count in (0, 1, 2, 150, 300, 301):
        assert torch.equal(smallest_per_row(scores, count), by_sorting(scores, count))
    flat = scores.reshape(1, -1)
    assert torch.equal(smallest(scores, 777), by_sorting(flat, 777).reshape(scores.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_bisection_finds_the_score_that_sorting_finds(kind):
    scores = scores_of(kind)
    in_order = scores.sort(dim=1).values
    for count in (1, 2, 150, 300, 301):
        assert torch.equal(kth_by_bisection(scores, count), in_order[:, count - 1 : count])


@pytest.mark.parametrize("cols", [2, 4, 8, 9])
def test_few_columns_and_many_rows_are_chosen_as_others_are(cols):
    generator = torch.Generator().manual_seed(cols)
    scores = torch.randn(5000, cols, generator=generator).mul(2).round()  # of both signs of zero, too
    for count in (0, 1, cols // 2, cols):
        assert torch.equal(smallest_per_row(scores, count), by_sorting(scores, count))
        assert torch.equal(smallest_per_row(scores[:7], count), by_sorting(scores[:7], count))


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="4 of 3"):
        smallest_per_row(torch.ones(2, 3), 4)
    with pytest.raises(ValueError, match="NaN"):
        smallest(torch.tensor([1.0, torch.nan]), 1)
