"""Layers and calibration sets as they should not be: right or refused by name, never silently wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.capture import capture
from stages.errors import NumericalError
from stages.in_memory import ListStream, NullCallbacks
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.prune_block import prune_block
from stages.pruners.alps import alps
from stages.pruners.hessian import factorise
from stages.pruners.sparsegpt import sparsegpt
from stages.pruners.statistics import HessianSum, SquareSum
from stages.pruners.wanda import wanda_mask
from stages.quantization.grid import fit_grid
from stages.sparsity.budget import BlockBudget, LayerBudget
from stages.sparsity.nm_pattern import Pattern
from tests.blocks import context_of, output_of, pruner_named
from tests.small_models import VOCAB, save

FP32 = torch.float32


@st.composite
def odd_layers(draw):
    """A weight, the inputs of a few tokens, some channels of them zero on every token, and a pattern or a count."""
    group = draw(st.sampled_from([None, 2, 3, 4, 8]))
    cols = draw(st.integers(1, 40)) * (group or draw(st.sampled_from([1, 7])))
    rows, tokens = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 30, 400]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(tokens, cols, generator=g)
    dead = torch.rand(cols, generator=g) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    x[:, dead] = 0
    weight = torch.randn(rows, cols, generator=g)
    if draw(st.booleans()):
        weight[0] = 0
    pattern = Pattern(draw(st.integers(1, group - 1)), group) if group else None
    count = pattern.count(weight.numel()) if pattern else draw(st.integers(0, weight.numel()))
    return weight, x, dead, pattern, count


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(odd_layers(), st.sampled_from([None, 2, 4]))
def test_every_pruner_keeps_its_promises_on_odd_layers(layer, bits):
    weight, x, dead, pattern, count = layer
    hessian = HessianSum(weight.shape[1], torch.device("cpu"))
    hessian.add(x)
    factor = factorise(hessian.matrix(), 0.01, on_retry=lambda _: None)
    assert torch.equal(factor.dead, (x == 0).all(0))
    grid = fit_grid(weight, bits) if bits else None
    swept, mask = sparsegpt(weight, factor, count, pattern=pattern, grid=grid)
    solved, other = alps(weight, hessian.matrix(), factor, count, pattern=pattern)
    squares = SquareSum(weight.shape[1], torch.device("cpu"))
    squares.add(x)
    third = wanda_mask(weight, squares.mean_square(), count, pattern)
    for result, chosen in ((swept, mask), (solved, other), (weight.masked_fill(third, 0), third)):
        assert torch.isfinite(result).all()
        assert chosen.sum() == count
        assert torch.all(result[chosen] == 0)
        if pattern:
            assert (chosen.reshape(-1, pattern.group).sum(1) == pattern.num_zero).all()
    assert torch.all(swept[:, dead] == 0)
    if grid is not None:
        grid.codes_of_stored(swept)


@pytest.fixture
def model(tmp_path):
    return open_model(resolve(str(save(tmp_path / "m", "llama-gqa"))))


def prune_first(model, pruner, *, spoil=None, ignore=(), damping=0.01, **changes):
    """Block 0 of a model pruned to a half, on two samples. spoil: done to the stream of its inputs first."""
    inputs, biased = ListStream(2, (8,), torch.long), ListStream(2, (8, 32), FP32)
    for i in range(2):
        inputs.write(i, torch.randint(4, VOCAB, (8,), generator=torch.Generator().manual_seed(i)))
    callbacks = NullCallbacks()
    context = context_of(model, inputs, callbacks=callbacks)
    capture(context, biased, None)
    if spoil:
        spoil(biased)
    layers = [x for x in model.layers(0) if x.path.rpartition(".")[2] not in ignore]
    budget = BlockBudget(tuple(LayerBudget(x.name, x.role, x.rows * x.cols, x.rows * x.cols // 2) for x in layers))
    chosen, output = (
        pruner_named(pruner, damping=damping, **changes),
        output_of(model, 0, FP32, ListStream(2, (8, 32), FP32)),
    )
    result = prune_block(context.block(0), chosen, budget, biased, output=output)
    return result, callbacks


@pytest.mark.parametrize("pruner", ["sparsegpt", "alps"])
def test_activations_that_overflowed_are_refused_by_block_and_layer(model, pruner):
    def spoil(stream):
        stream.write(1, torch.full((8, 32), float("inf")))

    with pytest.raises(NumericalError, match=r"block 0, layer self_attn\.[qkv]_proj: the Hessian holds infinities"):
        prune_first(model, pruner, spoil=spoil)


@pytest.mark.parametrize("pruner", ["sparsegpt", "alps", "wanda", "magnitude"])
def test_weights_that_are_no_numbers_are_refused_by_block_and_layer(tmp_path, pruner):
    from tests.small_models import build, tokenizer

    whole = build("llama-gqa")
    with torch.no_grad():
        whole.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    whole.save_pretrained(tmp_path / "bad")
    tokenizer().save_pretrained(tmp_path / "bad")
    with pytest.raises(NumericalError, match=r"block 0, layer (mlp\.up_proj: the weights|\S+: the Hessian) holds? "):
        prune_first(open_model(resolve(str(tmp_path / "bad"))), pruner)


@pytest.mark.parametrize("pruner", ["sparsegpt", "alps", "wanda"])
def test_an_input_that_is_all_zero_prunes_all_the_same(model, pruner):
    def spoil(stream):
        for i in range(2):
            stream.write(i, torch.zeros(8, 32))

    result, _ = prune_first(model, pruner, spoil=spoil, pattern=Pattern(2, 4))
    assert all(torch.isfinite(tensor).all() for tensor in result.finished.state.values())
    assert all(
        layer.num_masked * 2 == 32 * model.layers(0)[i].rows * model.layers(0)[i].cols // 32
        for i, layer in enumerate(result.finished.layers)
    )


@pytest.mark.parametrize("pruner", ["sparsegpt", "alps"])
def test_a_layer_left_out_keeps_its_weights_and_the_others_their_shared_hessian(model, pruner):
    whole, _ = prune_first(model, pruner)
    part, _ = prune_first(model, pruner, ignore=("q_proj", "k_proj"))
    original = model.load_block(0, torch.device("cpu")).state_dict()
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        assert torch.equal(part.finished.state[name], original[name])
    name = "self_attn.v_proj.weight"
    assert torch.equal(part.finished.state[name], whole.finished.state[name])
    assert not torch.equal(part.finished.state[name], original[name])


def test_a_block_with_nothing_to_prune_passes_the_stream_on(model):
    names = {x.path.rpartition(".")[2] for x in model.layers(0)}
    result, _ = prune_first(model, "sparsegpt", ignore=names)
    original = model.load_block(0, torch.device("cpu")).state_dict()
    assert result.finished.layers == ()
    assert all(torch.equal(tensor, original[name]) for name, tensor in result.finished.state.items())
