"""Samples that share a forward pass: the same results up to rounding."""

import dataclasses

import pytest
import torch

from stages.capture import capture
from stages.in_memory import ListStream, NullCallbacks
from stages.machine.device import DeviceChoices
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.prune_block import prune_block
from stages.runtime.block_runner import BlockRunner, Counter, micro_batches, samples_at_once
from stages.training.rates import Rate
from stages.training.trainer import BlockTrainer, Purpose, TrainingSettings
from tests.blocks import budget_of, context_of, output_of, perplexity_of, pruner_named
from tests.small_models import FAMILIES, VOCAB, save

ONE = DeviceChoices("cpu", "float32", 1, "highest", "here")
N, T, H = 5, 16, 32


def together(samples):
    return dataclasses.replace(ONE, batch_tokens=samples * T)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: open_model(resolve(str(save(root / family, family)))) for family in FAMILIES}


def stream():
    return ListStream(N, (T, H), torch.float32)


def rows(of):
    return torch.stack([of[i] for i in range(len(of))])


def calibration():
    inputs = ListStream(N, (T,), torch.long)
    for i in range(N):
        inputs.write(i, torch.randint(4, VOCAB, (T,), generator=torch.Generator().manual_seed(i)))
    return inputs


def test_samples_are_grouped_in_their_order_with_a_shorter_last_group():
    assert micro_batches(range(N), T, together(2)) == [range(2), range(2, 4), range(4, 5)]
    assert micro_batches(range(N), T, ONE) == [range(i, i + 1) for i in range(N)]
    assert micro_batches([], T, ONE) == []
    assert samples_at_once(together(3), T) == 3
    assert samples_at_once(ONE, T) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [2, 5])
def test_capture_and_propagation_do_not_depend_on_how_many_samples_share_a_pass(models, family, samples):
    model, inputs = models[family], calibration()
    found = []
    for choices in (ONE, together(samples)):
        biased, dense, out = stream(), stream(), stream()
        capture(context_of(model, inputs, choices), biased, dense)
        runner = BlockRunner(model, model.load_block(1, choices.torch_device), 1, inputs, choices)
        runner.propagate(dense, out, lambda: None, lambda count: None)
        found.append([rows(x) for x in (biased, dense, out)])
    for alone, shared in zip(*found, strict=True):
        assert torch.allclose(alone, shared, rtol=1e-4, atol=1e-5 * alone.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("streams", "training"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_training_steps_may_have_another_arithmetic_than_the_streams(models, family, streams, training):
    model, inputs = models[family], calibration()
    outs = []
    for choices in (ONE, dataclasses.replace(ONE, dtype=streams, train_dtype=training)):
        dense = ListStream(N, (T, H), choices.torch_dtype)
        capture(context_of(model, inputs, choices), ListStream(N, (T, H), choices.torch_dtype), dense)
        block = model.load_block(1, choices.torch_device).requires_grad_()
        runner = BlockRunner(model, block, 1, inputs, choices)
        with runner.reading([[0]], dense) as read:
            (batch,) = read
            out = runner.training_forward(batch.samples[0], batch.call)
        out.float().square().mean().backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in block.parameters())
        outs.append(out.detach().float())
    torch.testing.assert_close(outs[1], outs[0], rtol=0.1, atol=0.05 * float(outs[0].abs().max()))


def test_a_stream_may_be_replaced_by_what_the_block_makes_of_it(models):
    model, inputs = models["llama-gqa"], calibration()
    source, out = stream(), stream()
    capture(context_of(model, inputs, ONE), source, None)
    runner = BlockRunner(model, model.load_block(0, ONE.torch_device), 0, inputs, together(2))
    counts = []
    runner.propagate(source, out, lambda: None, counts.append)
    runner.propagate(source, source, lambda: None, lambda count: None)
    assert torch.equal(rows(source), rows(out))
    assert counts == [2, 2, 1]


def test_pruning_and_losses_do_not_depend_on_it_either(models):
    model, inputs = models["llama-gqa"], calibration()
    results, losses = [], []
    for choices in (ONE, together(2), together(5)):
        biased, dense, out = stream(), stream(), stream()
        capture(context_of(model, inputs, ONE), biased, dense)
        context, output = context_of(model, inputs, choices), output_of(model, 0, torch.float32, out)
        budget = budget_of(model, 0.5)[0]
        result = prune_block(context.block(0), pruner_named("sparsegpt"), budget, biased, output=output)
        results.append((result, rows(out)))
        settings = TrainingSettings(epochs=0, lr=Rate(1e-3), lr_decay=1.0, holds_out=False, seed=0)
        block, purpose = model.load_block(1, choices.torch_device), Purpose("compensate", 0, 0)
        trainer = BlockTrainer(context.block(1), block, biased, dense, settings, purpose)
        losses.append(trainer.first_pass().judged)
    for result, out in results[1:]:
        for name, layer in results[0][0].outcome.layers.items():
            assert (layer.mask == result.outcome.layers[name].mask).double().mean() > 0.97
            assert layer.relative_error == pytest.approx(result.outcome.layers[name].relative_error, rel=1e-2)
        assert (out - results[0][1]).norm() < 1e-2 * out.norm()
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_perplexity_does_not_depend_on_it(models):
    windows = torch.randint(4, VOCAB, (7, T), generator=torch.Generator().manual_seed(0))
    found = [perplexity_of(models["opt"], windows, choices) for choices in (ONE, together(3))]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_counter_adds_up():
    class RecordingWatcher(NullCallbacks):
        def __init__(self):
            super().__init__()
            self.seen = []

        def report(self, done, total, unit, **figures):
            self.seen.append((done, total, unit, figures))

    watcher = RecordingWatcher()
    counter = Counter(watcher, 9, "samples", done=2)
    counter.advance()
    counter.advance(3, loss=0.5)
    assert watcher.seen == [(3, 9, "samples", {}), (6, 9, "samples", {"loss": 0.5})]
