"""Capture, prune and compensate in memory, against the whole model run by transformers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.errors import NumericalError
from stages.in_memory import ListScratch, ListStream, NullCallbacks
from stages.machine.device import DeviceChoices
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.prune_block import PruneSettings, prune_block
from stages.refine_block import refine_block
from stages.sparsity.budget import LayerShape, allocate
from stages.sparsity.nm_pattern import Pattern
from stages.training.loss import block_loss, split_samples
from stages.training.trainer import TrainingSettings
from tests.small_models import VOCAB, save

CHOICES = DeviceChoices("cpu", "float32", torch.get_num_threads(), "highest", "here")
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


def budget_of(model, sparsity, alpha=1.0, beta=0.0):
    blocks = [[LayerShape(x.name, x.role, x.rows, x.cols) for x in model.layers(i)] for i in range(model.num_blocks)]
    return allocate(blocks, sparsity, alpha, beta)


def settings(**changes):
    return TrainingSettings(**{"epochs": 2, "lr": 1e-3, "lr_decay": 0.9, "hold_aside": True, "seed": 0, **changes})


def block_inputs(whole, list_name, ids):
    """What each block of a whole model gets, by hooks on the model's own forward."""
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


def _compensated(*args):
    result = compensate_block(*args)
    return result.state, result.training


def lamp(model, inputs, method="lamp"):
    """All of Algorithm 1, in memory: streams by block, and the pruned states."""
    num_blocks, dtypes = model.num_blocks, [dict.fromkeys(model.stored_names(i), FP32) for i in range(model.num_blocks)]
    biased, dense = {0: stream()}, {1: stream()}
    capture(model, inputs, biased[0], dense[1], CHOICES, NullCallbacks())
    states, budget = {}, budget_of(model, 0.6, 0.8)
    for i in range(num_blocks):
        state = None
        if i and method == "lamp":
            dense[i + 1] = stream()
            args = (model, i, inputs, biased[i], dense[i], dense[i + 1], settings(), CHOICES, NullCallbacks())
            state = compensate_block(*args).state
        biased[i + 1] = stream()
        result = prune_block(
            *(
                model,
                i,
                budget[i],
                PruneSettings("sparsegpt" if method == "lamp" else method),
                CHOICES,
                NullCallbacks(),
            ),
            state=state,
            export_dtypes=dtypes[i],
            inputs=inputs,
            biased=biased[i],
            biased_out=biased[i + 1],
        )
        states[i] = result.finished.state
        assert [x.num_masked for x in result.finished.layers] == [x.num_masked for x in budget[i].layers]
    return biased, dense, states


def test_both_streams_are_what_the_whole_models_compute(folder, model, inputs):
    biased, dense, states = lamp(model, inputs)
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    pruned = AutoModelForCausalLM.from_pretrained(folder).eval()
    for i, state in states.items():
        pruned.get_submodule(model._list_name)[i].load_state_dict(state)
    for sample in range(N):
        through_original = block_inputs(original, model._list_name, inputs[sample])
        through_pruned = block_inputs(pruned, model._list_name, inputs[sample])
        for i in range(model.num_blocks):
            assert torch.equal(biased[i][sample], through_pruned[i])
            if i:
                assert torch.equal(dense[i][sample], through_original[i])


def test_compensation_reports_the_mse_of_the_last_blocks_output(model, inputs):
    biased, dense, _ = lamp(model, inputs, "sparsegpt")
    target = stream()
    state, result = _compensated(
        *(model, 1, inputs, biased[1], dense[1], target, settings(hold_aside=False), CHOICES, NullCallbacks())
    )
    with torch.no_grad():
        ends, block = model.load_ends(torch.device("cpu")), model.load_block(1, torch.device("cpu"))
        trained = model.load_block(1, torch.device("cpu"), state=state)
        before, after = [], []
        for i in range(N):
            call = ends.enter(inputs[i][None]).calls[1]
            wanted = model.run_block(block, dense[1][i][None], call)
            assert torch.equal(target[i], wanted[0])
            before.append(functional.mse_loss(model.run_block(block, biased[1][i][None], call), wanted).item())
            after.append(functional.mse_loss(model.run_block(trained, biased[1][i][None], call), wanted).item())
    assert result.before.trained == pytest.approx(sum(before) / N, rel=1e-6)
    assert result.after.trained == pytest.approx(sum(after) / N, rel=1e-6)
    assert result.after.trained < result.before.trained
    assert (result.num_steps, result.kept_epoch, result.before.aside) == (2 * N, 2, None)


def test_an_update_that_makes_it_worse_is_never_kept(model, inputs):
    biased, dense, _ = lamp(model, inputs, "sparsegpt")
    args = (model, 1, inputs, biased[1], dense[1], stream())
    state, result = _compensated(*args, settings(lr=3.0), CHOICES, NullCallbacks())
    assert result.kept_epoch == 0
    assert result.after == result.before
    # Each epoch begins at the original weights again, at a lower rate: what it learns is less and less harmful.
    first, second = (epoch.aside for epoch in result.epoch_losses)
    assert second < first
    original = model.load_block(1, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in state.items())


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_change(model, inputs):
    biased, dense, _ = lamp(model, inputs, "sparsegpt")
    args = (model, 1, inputs, biased[1], dense[1], stream())
    with pytest.raises(NumericalError, match=r"block 1: the loss became .* use a smaller --lr"):
        compensate_block(*args, settings(lr=1e30, hold_aside=False), CHOICES, NullCallbacks())


def test_weights_that_diverged_in_the_last_step_are_refused(model, inputs):
    biased, target, pruned = pruned_for_refining(model, inputs)
    with pytest.raises(NumericalError, match="block 1: "):
        refine_block(
            *(model, 1, inputs, biased, target, pruned.state, pruned.outcome),
            *(settings(lr=1e38, epochs=1, hold_aside=False), CHOICES, NullCallbacks()),
            export_dtypes=dict.fromkeys(model.stored_names(1), FP32),
            biased_out=None,
        )


def test_wanda_masks_come_from_the_inputs_that_each_layer_really_gets(folder, model, inputs):
    biased = stream()
    capture(model, inputs, biased, None, CHOICES, NullCallbacks())
    result = prune_block(
        *(model, 0, budget_of(model, 0.5)[0], PruneSettings("wanda"), CHOICES, NullCallbacks()),
        export_dtypes=dict.fromkeys(model.stored_names(0), FP32),
        inputs=inputs,
        biased=biased,
    )
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    block = whole.get_submodule(model._list_name)[0]
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
    biased, out = stream(), stream()
    capture(model, inputs, biased, None, CHOICES, NullCallbacks())
    result = prune_block(
        *(model, 0, budget_of(model, 0.5)[0], PruneSettings("sparsegpt"), CHOICES, NullCallbacks()),
        export_dtypes=dict.fromkeys(model.stored_names(0), torch.bfloat16),
        inputs=inputs,
        biased=biased,
        biased_out=out,
    )
    assert {t.dtype for t in result.finished.state.values()} == {torch.bfloat16}
    with torch.no_grad():
        block = model.load_block(0, torch.device("cpu"), state=result.finished.state)
        call = model.load_ends(torch.device("cpu")).enter(inputs[0][None]).calls[0]
        assert torch.equal(model.run_block(block, biased[0][None], call)[0], out[0])


def test_relative_error_is_that_of_the_layers_output(model, inputs):
    biased = stream()
    capture(model, inputs, biased, None, CHOICES, NullCallbacks())
    before = model.load_block(0, torch.device("cpu"))
    result = prune_block(
        *(model, 0, budget_of(model, 0.5)[0], PruneSettings("sparsegpt"), CHOICES, NullCallbacks()),
        export_dtypes=dict.fromkeys(model.stored_names(0), FP32),
        inputs=inputs,
        biased=biased,
    )
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
def test_samples_kept_aside(num_samples, hold_aside):
    train, aside = split_samples(num_samples, hold_aside)
    assert sorted(train + aside) == list(range(num_samples))
    expected = max(1, math.floor(num_samples / 16)) if hold_aside and num_samples > 1 else 0
    assert len(aside) == expected


def test_one_sample_only_is_trained_on_and_said(model, inputs):
    one = ListStream(1, (T,), torch.long)
    one.write(0, inputs[0])
    biased, dense, target = (ListStream(1, (T, H), FP32) for _ in range(3))
    capture(model, one, biased, dense, CHOICES, NullCallbacks())
    biased.write(0, dense[0] + 0.3 * torch.randn(T, H, generator=torch.Generator().manual_seed(7)))
    callbacks = NullCallbacks()
    _, result = _compensated(model, 1, one, biased, dense, target, settings(), CHOICES, callbacks)
    assert "only one calibration sample" in callbacks.warnings[0]
    assert result.after.trained < result.before.trained


def pruned_for_refining(model, inputs, **changes):
    """Block 1 pruned on the biased stream of a SparseGPT run, and what refining it needs."""
    biased, dense, _ = lamp(model, inputs, "sparsegpt")
    target = stream()
    compensate_block(model, 1, inputs, biased[1], dense[1], target, settings(epochs=0), CHOICES, NullCallbacks())
    budget = budget_of(model, 0.5 if "pattern" in changes else 0.6)[1]
    result = prune_block(
        *(model, 1, budget, PruneSettings("sparsegpt", **changes), CHOICES, NullCallbacks()),
        export_dtypes=None,
        inputs=inputs,
        biased=biased[1],
    )
    assert result.finished is None
    return biased[1], target, result


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
    result = refine_block(
        *(model, 1, inputs, biased, target, pruned.state, pruned.outcome),
        *(settings(lr=3e-3, epochs=8, hold_aside=False), CHOICES, NullCallbacks()),
        export_dtypes=dict.fromkeys(model.stored_names(1), dtype),
        biased_out=out,
    )
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
    result = refine_block(
        *(model, 1, inputs, biased, target, pruned.state, pruned.outcome, settings(lr=3.0), CHOICES, NullCallbacks()),
        export_dtypes=dict.fromkeys(model.stored_names(1), FP32),
        biased_out=None,
    )
    assert result.training.kept_epoch == 0
    assert all(torch.equal(tensor, pruned.state[name]) for name, tensor in result.finished.state.items())


def test_compensation_with_no_epochs_only_writes_the_targets(model, inputs):
    biased, dense, _ = lamp(model, inputs, "sparsegpt")
    target = stream()
    result = compensate_block(
        model, 1, inputs, biased[1], dense[1], target, settings(epochs=0), CHOICES, NullCallbacks()
    )
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
    biased, dense, _ = lamp(model, inputs, "sparsegpt")
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda o, *a: rates.append(o.param_groups[0]["lr"]) or step(o, *a))
    chosen = settings(epochs=3, lr_decay=0.5, hold_aside=False)
    compensate_block(model, 1, inputs, biased[1], dense[1], stream(), chosen, CHOICES, NullCallbacks())
    assert rates == [1e-3] * N + [5e-4] * N + [2.5e-4] * N


def test_best_weights_on_the_disk_change_nothing(model, inputs):
    biased, dense = stream(), stream()
    capture(model, inputs, biased, dense, CHOICES, NullCallbacks())
    found = []
    for spill in (None, ListScratch()):
        result = compensate_block(
            *(model, 1, inputs, biased, dense, stream(), settings(epochs=3, lr=3e-2), CHOICES, NullCallbacks()), spill
        )
        found.append(result)
    assert found[0].training == found[1].training
    assert all(torch.equal(tensor, found[1].state[name]) for name, tensor in found[0].state.items())
