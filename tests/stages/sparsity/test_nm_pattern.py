"""N:M patterns against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import UsageError
from stages.sparsity.budget import BudgetError, LayerShape, follow_pattern
from stages.sparsity.nm_pattern import Pattern


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "31:32", " 2:4 "])
def test_patterns_are_read(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text.strip()
    assert pattern.sparsity == pattern.num_zero / pattern.group


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2:33", "2/4", "2:4:8", "", "a:b", "-1:4", "2.0:4", "٢:٤"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(UsageError, match="expected N:M"):
        Pattern.parse(text)


@given(st.integers(2, 8), st.data())
def test_each_group_loses_its_smallest_scores(group, data):
    num_zero = data.draw(st.integers(1, group - 1))
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * groups * group, max_size=rows * groups * group))
    scores = torch.tensor(values, dtype=torch.float32).reshape(rows, groups * group)
    mask = Pattern(num_zero, group).mask(scores)
    for row in range(rows):
        for start in range(0, groups * group, group):
            order = sorted(range(group), key=lambda k: (scores[row, start + k].item(), k))
            expected = [k in order[:num_zero] for k in range(group)]
            assert mask[row, start : start + group].tolist() == expected
    assert Pattern(num_zero, group).share_held(mask) == 1
    assert mask.sum() == Pattern(num_zero, group).count(scores.numel())


def test_a_group_with_too_few_zeros_is_seen():
    zeros = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 1]]).bool()
    assert Pattern(2, 4).share_held(zeros) == 0.75


def test_the_budget_of_a_pattern_is_exact_and_a_width_that_does_not_fit_is_refused_by_name():
    blocks = [[LayerShape("b.0.q", "q", 6, 8), LayerShape("b.0.fc2", "fc2", 8, 16)]]
    assert [x.num_masked for x in follow_pattern(blocks, Pattern(3, 8))[0].layers] == [18, 48]
    with pytest.raises(BudgetError, match=r"b\.0\.q has 8 columns, no multiple of 16.*--ignore 'q\$'"):
        follow_pattern(blocks, Pattern(8, 16))
