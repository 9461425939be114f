"""Budgets: exact totals, the paper's equations, and refusals with numbers."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.sparsity.budget import BudgetError, LayerShape, allocate, feasible_alpha, feasible_beta


def block(index, hidden=16, inner=48, kv=None):
    shapes = {"q": (hidden, hidden), "k": (kv or hidden, hidden), "v": (kv or hidden, hidden), "out": (hidden, hidden)}
    shapes |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    return [LayerShape(f"{index}.{role}", role, rows, cols) for role, (rows, cols) in shapes.items()]


shapes = st.lists(
    st.builds(block, st.just(0), st.integers(1, 9), st.integers(1, 40), st.none() | st.integers(1, 9)),
    min_size=1,
    max_size=6,
).map(
    lambda blocks: [
        [LayerShape(f"{i}.{layer.role}", layer.role, layer.rows, layer.cols) for layer in b]
        for i, b in enumerate(blocks)
    ]
)


@settings(max_examples=300, deadline=None)
@given(shapes, st.floats(0.01, 0.99), st.floats(0.05, 1), st.floats(0, 1))
def test_counts_are_whole_feasible_and_add_up_exactly(blocks, sparsity, alpha, beta):
    total = sum(layer.size for b in blocks for layer in b)
    budget, reason = None, ""
    try:
        budget = allocate(blocks, sparsity, alpha, beta)
    except BudgetError as error:
        reason = str(error)
    if budget is None:
        assert "would have to lose" in reason
        return
    assert sum(b.num_masked for b in budget) == round(Fraction(str(sparsity)) * total)
    for b in budget:
        for layer in b.layers:
            assert 0 <= layer.num_masked <= layer.size


@settings(max_examples=200, deadline=None)
@given(shapes, st.floats(0.1, 0.95), st.floats(0.05, 1), st.floats(0, 1))
def test_feasible_values_are_feasible_and_no_further_than_needed(blocks, sparsity, alpha, beta):
    b = feasible_beta(blocks, sparsity, 1.0, beta)
    a = feasible_alpha(blocks, sparsity, alpha, b)
    assert b <= beta
    assert a >= alpha or a == 1.0
    allocate(blocks, sparsity, 1.0, b)
    if len(blocks) > 1:
        allocate(blocks, sparsity, a, b)
        if a > alpha + 2e-4:
            with pytest.raises(BudgetError):
                allocate(blocks, sparsity, a - 2e-4, b)


def test_the_papers_equations_in_numbers():
    """4 equal blocks, s = 0.5, alpha = 0.7, beta = 0.2: computed by hand."""
    blocks = [block(i, hidden=100, inner=200) for i in range(4)]  # 80,000 weights a block
    budget = allocate(blocks, 0.5, 0.7, 0.2)
    # P_4 = 80,000 * 0.5 * 0.7; the others share the 12,000 that are left.
    assert [b.num_masked for b in budget] == [44_000, 44_000, 44_000, 28_000]
    counts = {layer.role: layer.num_masked for layer in budget[0].layers}
    # s_block = 0.55: q, k, v keep 80% of 5,500; fc2 takes the 3 * 1,100 that they gave up; the others have 0.55.
    assert counts == {"q": 4_400, "k": 4_400, "v": 4_400, "out": 5_500, "fc1": 11_000, "fc2": 11_000 + 3_300}
    last = {layer.role: layer.num_masked for layer in budget[3].layers}
    assert last == {"q": 2_800, "k": 2_800, "v": 2_800, "out": 3_500, "fc1": 7_000, "fc2": 7_000 + 2_100}


def test_fc2_takes_exactly_what_grouped_q_k_v_give_up():
    """Eq. 4 as printed would change the total if fc2 is not as large as q, k and v together."""
    plain = allocate([block(0, 64, 192, kv=16)], 0.5, 1.0, 0.0)[0]
    moved = allocate([block(0, 64, 192, kv=16)], 0.5, 1.0, 0.25)[0]
    change = {p.role: m.num_masked - p.num_masked for p, m in zip(plain.layers, moved.layers, strict=True)}
    assert change == {"q": -512, "k": -128, "v": -128, "out": 0, "fc1": 0, "fc2": 768}


def test_one_block_ignores_alpha():
    assert allocate([block(0)], 0.5, 0.6, 0.0) == allocate([block(0)], 0.5, 1.0, 0.0)


def test_fixed_layers_keep_their_own_sparsity():
    blocks = [block(0), block(1)]
    budget = allocate(blocks, 0.5, 1.0, 0.0, {"0.fc2": 0.25, "1.q": 0.0})
    counts = {layer.name: layer.num_masked for b in budget for layer in b.layers}
    assert counts["0.fc2"] == 16 * 48 // 4
    assert counts["1.q"] == 0
    free = sum(x.size for b in blocks for x in b) - 16 * 48 - 16 * 16
    assert sum(counts.values()) == round(0.5 * free) + 16 * 48 // 4


def test_a_decimal_sparsity_is_the_users_decimal():
    # 0.7 * 30 in binary floating point is 20.999999999999996: two thirds of a user's weights hang on this in 2:4.
    assert allocate([[LayerShape("a", "q", 3, 10)]], 0.7, 1.0, 0.0)[0].num_masked == 21
    # 0.15 * 10 = 1.5 exactly: half to even, as round() does.
    assert allocate([[LayerShape("a", "q", 1, 10)]], 0.15, 1.0, 0.0)[0].num_masked == 2


def test_above_100_percent_is_refused_with_the_number():
    with pytest.raises(BudgetError, match=r"block 0 would have to lose 117\.00% of 0\.q"):
        allocate([block(0), block(1)], 0.9, 0.7, 0.0)


def test_beta_needs_known_roles():
    blocks = [[LayerShape("a", None, 8, 8), LayerShape("b", "fc2", 8, 8)]]
    with pytest.raises(BudgetError, match="--beta 0"):
        allocate(blocks, 0.5, 1.0, 0.1)
    assert feasible_beta(blocks, 0.5, 1.0, 0.1) == 0.0
