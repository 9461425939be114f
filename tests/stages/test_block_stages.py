"""Capture, prune and compensate in memory, compared with the whole model in transformers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from stages import lamp as lamp_module
from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.errors import NumericalError
from stages.finish_block import finish_block
from stages.in_memory import ListScratch, ListStream, NullCallbacks
from stages.lamp import LampSettings, lamp
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.prune_block import prune_block
from stages.refine_block import refine_block
from stages.runtime.block_runner import BlockRunner
from stages.sparsity.nm_pattern import Pattern
from stages.sparsity.outcome import PruneOutcome
from stages.training.loss import block_loss, split_samples
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import budget_of, context_of, output_of, pruner_named
from tests.small_models import VOCAB, save

pytestmark = pytest.mark.long

N, T, H = 5, 16, 32
FP32 = torch.float32


@pytest.fixture(scope="module", params=["llama-gqa", "opt-350m", "bloom"])
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "m", request.param)


@pytest.fixture
def model(folder):
    return open_model(resolve(str(folder)))


@pytest.fixture
def inputs():
    stream = ListStream(N, (T,), torch.long)
    for i in range(N):
        stream.write(i, torch.randint(4, VOCAB, (T,), generator=torch.Generator().manual_seed(i)))
    return stream


def stream():
    return ListStream(N, (T, H), FP32)


class NoProgress:
    def boundary(self):
        raise AssertionError("there is no stream to write")


def settings(**changes):
    return TrainingSettings(**{"epochs": 2, "lr": Rate(1e-3), "lr_decay": 0.9, "holds_out": True, "seed": 0, **changes})


def block_inputs(whole, list_name, ids):
    """The input of each block, recorded by hooks on the forward pass of the whole model."""
    seen = []
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in whole.get_submodule(list_name)
    ]
    with torch.no_grad():
        whole(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [hidden[0] for hidden in seen]


def compensated(model, inputs, streams, settings, callbacks=None, spill=None):
    """Block 1 after compensation. streams: its biased and dense inputs, and the stream of its targets."""
    return compensate_block(context_of(model, inputs, callbacks=callbacks).block(1), *streams, settings, spill)


def after_block_0(model, inputs):
    """Both inputs of block 1, block 0 pruned by SparseGPT, and an empty stream for its targets."""
    context, biased, dense, out = context_of(model, inputs), stream(), stream(), stream()
    capture(context, biased, dense)
    budget = budget_of(model, 0.6, 0.8)[0]
    prune_block(context.block(0), pruner_named("sparsegpt"), budget, biased, output=output_of(model, 0, FP32, out))
    return out, dense, stream()


def first_pruned(model, inputs, pruner, dtype=FP32, out=None):
    """Block 0 pruned to 50%, and its input."""
    context, biased = context_of(model, inputs), stream()
    capture(context, biased, None)
    budget, output = budget_of(model, 0.5)[0], output_of(model, 0, dtype, out)
    return prune_block(context.block(0), pruner_named(pruner), budget, biased, output=output), biased


def recorded_streams(model, inputs, monkeypatch):
    """The blocks of Algorithm 1 in memory, and its biased and dense streams by block."""
    made = []
    monkeypatch.setattr(lamp_module, "_new_stream", lambda context: made.append(stream()) or made[-1])
    settings_ = LampSettings(pruner_named("sparsegpt"), settings())
    blocks = list(lamp(context_of(model, inputs), budget_of(model, 0.6, 0.8), settings_))
    (first, dense_1, *rest) = made  # then, from block 1 on: the target of the block, and before it block i's output
    return blocks, {0: first, **dict(enumerate(rest[0::2], 1))}, {1: dense_1, **dict(enumerate(rest[1::2], 2))}


def test_both_streams_are_what_the_whole_models_compute(folder, model, inputs, monkeypatch):
    blocks, biased, dense = recorded_streams(model, inputs, monkeypatch)
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    pruned = AutoModelForCausalLM.from_pretrained(folder).eval()
    for block in blocks:
        pruned.get_submodule(model.blocks_path)[block.index].load_state_dict(block.finished.state)
    assert set(biased) == set(range(model.num_blocks))
    assert set(dense) == set(range(1, model.num_blocks + 1))
    for sample in range(N):
        through_original = block_inputs(original, model.blocks_path, inputs[sample])
        through_pruned = block_inputs(pruned, model.blocks_path, inputs[sample])
        for i in range(model.num_blocks):
            assert torch.equal(biased[i][sample], through_pruned[i])
            if i:
                assert torch.equal(dense[i][sample], through_original[i])


def test_every_block_holds_its_budget(model, inputs):
    budget = budget_of(model, 0.6, 0.8)
    for block in lamp(context_of(model, inputs), budget, LampSettings(pruner_named("sparsegpt"), settings())):
        counts = [layer.num_masked for layer in block.finished.layers]
        assert counts == [layer.num_masked for layer in budget[block.index].layers]


def test_compensation_reports_the_mse_of_the_last_blocks_output(model, inputs):
    biased, dense, target = streams = after_block_0(model, inputs)
    found = compensated(model, inputs, streams, settings(holds_out=False))
    state, result = found.state, found.training
    with torch.no_grad():
        ends, block = model.load_ends(torch.device("cpu")), model.load_block(1, torch.device("cpu"))
        trained = model.load_block(1, torch.device("cpu"), state=state)
        before, after = [], []
        for i in range(N):
            call = ends.enter(inputs[i][None]).calls[1]
            wanted = model.run_block(block, dense[i][None], call)
            assert torch.equal(target[i], wanted[0])
            before.append(functional.mse_loss(model.run_block(block, biased[i][None], call), wanted).item())
            after.append(functional.mse_loss(model.run_block(trained, biased[i][None], call), wanted).item())
    assert result.before.trained == pytest.approx(sum(before) / N, rel=1e-6)
    assert result.after.trained == pytest.approx(sum(after) / N, rel=1e-6)
    assert result.after.trained < result.before.trained
    assert (result.num_steps, result.kept_epoch, result.before.held_out) == (2 * N, 2, None)


@pytest.mark.parametrize(("epochs", "holds_out"), [(0, True), (2, True), (0, False), (2, False)])
def test_only_the_samples_that_judge_are_passed_again(model, inputs, monkeypatch, epochs, holds_out):
    """Each pass over all samples is a third of an epoch's time."""
    streams, samples = after_block_0(model, inputs), []
    forward = BlockRunner.forward

    def counted(self, hidden, call):
        samples.extend(hidden)
        return forward(self, hidden, call)

    monkeypatch.setattr(BlockRunner, "forward", counted)
    found = compensated(model, inputs, streams, settings(epochs=epochs, holds_out=holds_out)).training
    num_judging = 1 if holds_out else N
    # The targets; before; after each epoch, or once after the last where no epoch is judged.
    assert len(samples) == N + num_judging + (epochs if holds_out else bool(epochs)) * num_judging
    assert (found.before.trained is None) == (found.after.trained is None) == holds_out
    if epochs and holds_out:
        assert found.after.held_out == min(losses.held_out for losses in (found.before, *found.epoch_losses))


def test_an_update_that_makes_it_worse_is_never_kept(model, inputs):
    found = compensated(model, inputs, after_block_0(model, inputs), settings(lr=Rate(3.0)))
    state, result = found.state, found.training
    assert result.kept_epoch == 0
    assert result.after == result.before
    # Each epoch starts from the original weights again, at a lower learning rate, and so does less harm.
    first, second = (epoch.held_out for epoch in result.epoch_losses)
    assert second < first
    original = model.load_block(1, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in state.items())


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_change(model, inputs):
    streams = after_block_0(model, inputs)
    with pytest.raises(NumericalError, match=r"block 1: the loss became .* use a smaller --lr"):
        compensated(model, inputs, streams, settings(lr=Rate(1e30), holds_out=False))


def test_weights_that_diverged_in_the_last_step_are_refused(model, inputs):
    biased, target, pruned = pruned_for_refining(model, inputs)
    diverging = settings(lr=Rate(1e38), epochs=1, holds_out=False)
    with pytest.raises(NumericalError, match="block 1: "):
        refine_block(context_of(model, inputs).block(1), pruned, biased, target, diverging, output_of(model, 1))


def test_wanda_masks_come_from_the_inputs_that_each_layer_really_gets(folder, model, inputs):
    result, _ = first_pruned(model, inputs, "wanda")
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    block = whole.get_submodule(model.blocks_path)[0]
    for layer in model.layers(0):
        module, squares = block.get_submodule(layer.path), []
        handle = module.register_forward_pre_hook(
            lambda m, a, s=squares: s.append(a[0].reshape(-1, a[0].shape[-1]).square().sum(0))
        )
        with torch.no_grad():
            for i in range(N):
                whole(inputs[i][None], use_cache=False)
        handle.remove()
        scores = module.weight.abs() * (torch.stack(squares).sum(0) / (N * T)).sqrt()
        pruned = result.finished.state[f"{layer.path}.weight"] == 0
        assert pruned.sum(1).tolist() == [layer.cols // 2] * layer.rows
        assert scores[pruned].numel() == layer.rows * layer.cols // 2
        for row in range(layer.rows):
            assert scores[row][pruned[row]].max() <= scores[row][~pruned[row]].min() * (1 + 1e-5)


def test_biased_output_is_computed_with_the_weights_as_exported(model, inputs):
    out = stream()
    result, biased = first_pruned(model, inputs, "sparsegpt", torch.bfloat16, out)
    assert {t.dtype for t in result.finished.state.values()} == {torch.bfloat16}
    with torch.no_grad():
        block = model.load_block(0, torch.device("cpu"), state=result.finished.state)
        call = model.load_ends(torch.device("cpu")).enter(inputs[0][None]).calls[0]
        assert torch.equal(model.run_block(block, biased[0][None], call)[0], out[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finished_block_has_its_weights_once(model, inputs, dtype):
    """A second copy of a block with many experts takes as much as the statistics of some passes."""
    block = model.load_block(0, torch.device("cpu"))
    expected = {name: tensor.to(dtype) for name, tensor in block.state_dict().items()}
    nothing = PruneOutcome({}, None)
    context = context_of(model, inputs).block(0)
    finished = finish_block(context, block, nothing, None, output_of(model, 0, dtype), NoProgress())
    assert list(finished.state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in finished.state.items())
    assert not sum(tensor.numel() for tensor in block.state_dict().values())


def test_relative_error_is_that_of_the_layers_output(model, inputs):
    before = model.load_block(0, torch.device("cpu"))
    result, biased = first_pruned(model, inputs, "sparsegpt")
    layer, figures = model.layers(0)[0], result.finished.layers[0]
    xs = []
    before.get_submodule(layer.path).register_forward_pre_hook(lambda m, a: xs.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        ends = model.load_ends(torch.device("cpu"))
        for i in range(N):
            model.run_block(before, biased[i][None], ends.enter(inputs[i][None]).calls[0])
    x, old = torch.cat(xs), before.get_submodule(layer.path).weight
    new = result.finished.state[f"{layer.path}.weight"]
    expected = (x @ (new - old).T).square().sum() / (x @ old.T).square().sum()
    assert figures.relative_error == pytest.approx(expected.item(), rel=1e-3)


@given(st.integers(1, 200), st.booleans())
def test_one_sample_in_sixteen_is_held_out(num_samples, holds_out):
    train, held_out = split_samples(num_samples, holds_out)
    assert sorted(train + held_out) == list(range(num_samples))
    expected = max(1, math.floor(num_samples / 16)) if holds_out and num_samples > 1 else 0
    assert len(held_out) == expected


def test_one_sample_only_is_trained_on_and_said(model, inputs):
    one = ListStream(1, (T,), torch.long)
    one.write(0, inputs[0])
    biased, dense, target = (ListStream(1, (T, H), FP32) for _ in range(3))
    capture(context_of(model, one), biased, dense)
    biased.write(0, dense[0] + 0.3 * torch.randn(T, H, generator=torch.Generator().manual_seed(7)))
    callbacks = NullCallbacks()
    result = compensated(model, one, (biased, dense, target), settings(), callbacks).training
    assert "only one calibration sample" in callbacks.warnings[0]
    assert result.after.trained < result.before.trained


def pruned_for_refining(model, inputs, **changes):
    """Block 1 pruned on the biased stream of a SparseGPT run, and the inputs of its refinement."""
    biased, _, target = streams = after_block_0(model, inputs)
    compensated(model, inputs, streams, settings(epochs=0))
    budget = budget_of(model, 0.5 if "pattern" in changes else 0.6)[1]
    pruner = pruner_named("sparsegpt", **changes)
    result = prune_block(context_of(model, inputs).block(1), pruner, budget, biased, output=None)
    assert result.finished is None
    return biased, target, result


def mean_loss(model, state, inputs, biased, target):
    with torch.no_grad():
        block, ends = model.load_block(1, torch.device("cpu"), state=state), model.load_ends(torch.device("cpu"))
        losses = [
            functional.mse_loss(
                model.run_block(block, biased[i][None], ends.enter(inputs[i][None]).calls[1]), target[i][None]
            )
            for i in range(N)
        ]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("changes", [{}, {"pattern": Pattern(2, 4)}, {"bits": 4}, {"bits": 3, "group_size": 16}])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_refining_lowers_the_loss_and_keeps_mask_pattern_and_grid(model, inputs, changes, dtype):
    biased, target, pruned = pruned_for_refining(model, inputs, **changes)
    out = stream()
    training, output = settings(lr=Rate(3e-3), epochs=8, holds_out=False), output_of(model, 1, dtype, out)
    result = refine_block(context_of(model, inputs).block(1), pruned, biased, target, training, output)
    state = result.finished.state
    assert mean_loss(model, state, inputs, biased, target) < mean_loss(model, pruned.state, inputs, biased, target)
    assert result.training.after.trained < result.training.before.trained
    for info in model.layers(1):
        layer, stored = pruned.outcome.layers[info.name], state[f"{info.path}.weight"]
        assert torch.all(stored[layer.mask] == 0)
        before = pruned.state[f"{info.path}.weight"]
        assert not torch.equal(stored.float(), before)
        if "bits" in changes:
            grid, size = layer.grid, layer.grid.group_size
            for row in range(info.rows):
                levels = (torch.arange(2 ** changes["bits"]) - grid.zero[row, :, None]) * grid.scale[row, :, None]
                for group, part in enumerate(stored[row].split(size)):
                    assert torch.isin(part, levels[group].to(dtype)).all()
    with torch.no_grad():
        block = model.load_block(1, torch.device("cpu"), state=state)
        call = model.load_ends(torch.device("cpu")).enter(inputs[0][None]).calls[1]
        assert torch.equal(model.run_block(block, biased[0][None], call)[0], out[0])


def test_a_refinement_that_makes_it_worse_is_never_kept(model, inputs):
    biased, target, pruned = pruned_for_refining(model, inputs)
    output = output_of(model, 1)
    result = refine_block(context_of(model, inputs).block(1), pruned, biased, target, settings(lr=Rate(3.0)), output)
    assert result.training.kept_epoch == 0
    assert all(torch.equal(tensor, pruned.state[name]) for name, tensor in result.finished.state.items())


def test_compensation_with_no_epochs_only_writes_the_targets(model, inputs):
    _, _, target = streams = after_block_0(model, inputs)
    result = compensated(model, inputs, streams, settings(epochs=0))
    original = model.load_block(1, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in result.state.items())
    assert result.training.num_steps == 0
    assert torch.isfinite(target[N - 1]).all()


def test_a_relative_loss_counts_each_token_alike():
    target = torch.tensor([[[1000.0, 1000.0], [1.0, 1.0]]])
    off = target + torch.tensor([[[100.0, 100.0], [0.1, 0.1]]])
    assert block_loss(off, target, "token").item() == pytest.approx(0.01)
    assert block_loss(off, target, "mse").item() == pytest.approx((100**2 + 0.1**2) / 2)
    only_second = target + torch.tensor([[[0.0, 0.0], [0.1, 0.1]]])
    assert block_loss(only_second, target, "token").item() == pytest.approx(0.005)


def test_the_rate_falls_by_epoch(model, inputs, monkeypatch):
    streams = after_block_0(model, inputs)
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda o, *a: rates.append(o.param_groups[0]["lr"]) or step(o, *a))
    compensated(model, inputs, streams, settings(epochs=3, lr_decay=0.5, holds_out=False))
    assert rates == [1e-3] * N + [5e-4] * N + [2.5e-4] * N


def test_a_relative_rate_is_that_share_of_every_tensor(model, inputs, monkeypatch):
    streams = after_block_0(model, inputs)
    block = model.load_block(1, torch.device("cpu"))
    sizes = [parameter.square().mean().sqrt().item() for parameter in block.parameters()]
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda o, *a: rates.append([g["lr"] for g in o.param_groups]) or step(o, *a)
    )
    relative = Rate(0.01, is_relative=True)
    compensated(model, inputs, streams, settings(epochs=1, lr=relative, holds_out=False))
    named = dict(block.named_parameters())
    expected = [
        size or named[f"{name.rpartition('.')[0]}.weight"].square().mean().sqrt().item()
        for size, name in zip(sizes, named, strict=True)
    ]
    assert len(rates) == N
    for found in rates:
        assert found == pytest.approx([0.01 * size for size in expected], rel=1e-5)


def test_best_weights_on_the_disk_change_nothing(model, inputs):
    biased, dense = stream(), stream()
    capture(context_of(model, inputs), biased, dense)
    found = [
        compensated(model, inputs, (biased, dense, stream()), settings(epochs=3, lr=Rate(3e-2)), spill=spill)
        for spill in (None, ListScratch())
    ]
    assert found[0].training == found[1].training
    assert all(torch.equal(tensor, found[1].state[name]) for name, tensor in found[0].state.items())
