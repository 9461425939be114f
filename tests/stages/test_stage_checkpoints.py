"""A stopped stage resumes from its checkpoint, at any batch boundary, and gives bit-identical results."""

import itertools

import pytest
import torch

from pipeline.rundir.step_checkpoints import _decode, _encode
from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.in_memory import ListStream, NullCallbacks
from stages.interfaces import Checkpoint
from stages.machine.device import DeviceChoices
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.prune_block import prune_block
from stages.refine_block import refine_block
from stages.sparsity.nm_pattern import Pattern
from stages.training.loss import block_loss
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import budget_of, context_of, output_of, perplexity_of, pruner_named
from tests.small_models import VOCAB, save

pytestmark = pytest.mark.long

N, T, H = 5, 16, 32
FP32 = DeviceChoices("cpu", "float32", 1, "highest", "here")
BF16 = DeviceChoices("cpu", "bfloat16", 1, "highest", "here")
TRAIN_BF16 = DeviceChoices("cpu", "float32", 1, "highest", "here", train_dtype="bfloat16")


class Stopped(Exception):
    pass


class StoppingCallbacks(NullCallbacks):
    """Resumes from `kept`; stops at boundary number `at` and keeps the checkpoint there, as a record on disk would."""

    def __init__(self, at: int | None = None, kept: Checkpoint | None = None) -> None:
        super().__init__()
        self.at, self.kept, self.num_boundaries, self.num_restorable = at, kept, 0, 0
        self.done: list[int] = []

    def restore(self):
        return self.kept

    def report(self, done, total, unit, **figures):
        assert 0 <= done <= total
        self.done.append(done)

    def checkpoint(self, make):
        self.num_restorable += 1
        self._at_boundary(make)

    def check_stop(self):
        self._at_boundary(None)

    def _at_boundary(self, make):
        if self.num_boundaries == self.at:
            if make is not None:
                binding = {"step": "this"}
                self.kept = _decode(_encode(make(), binding, 0.0), binding).checkpoint
            raise Stopped
        self.num_boundaries += 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(resolve(str(save(tmp_path_factory.mktemp("models") / "m", "llama-gqa"))))


@pytest.fixture(scope="module")
def inputs():
    stream = ListStream(N, (T,), torch.long)
    for i in range(N):
        stream.write(i, torch.randint(4, VOCAB, (T,), generator=torch.Generator().manual_seed(i)))
    return stream


@pytest.fixture(scope="module")
def streams(model, inputs):
    """The inputs of block 1: the biased stream is the dense one with noise."""
    biased, dense = ListStream(N, (T, H), torch.float32), ListStream(N, (T, H), torch.float32)
    capture(context_of(model, inputs, FP32), ListStream(N, (T, H), torch.float32), dense)
    for i in range(N):
        biased.write(i, dense[i] + 0.1 * torch.randn(T, H, generator=torch.Generator().manual_seed(i)))
    return biased, dense


def same(left, right):
    """Bit-identical, including NaN."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def every_stop(run, callbacks_of=StoppingCallbacks, step=1):
    """`run(callbacks)` uninterrupted, and stopped at every `step`-th boundary and resumed, with their callbacks."""
    uninterrupted = callbacks_of()
    expected = run(uninterrupted)
    for at in range(0, uninterrupted.num_boundaries, step):
        callbacks = callbacks_of(at)
        with pytest.raises(Stopped):
            run(callbacks)
        again = callbacks_of(None, callbacks.kept)
        yield at, expected, run(again), again, uninterrupted


TRAININGS = {
    "mse": (TrainingSettings(2, Rate(1e-3), 0.9, False, 0), FP32),
    "held out": (TrainingSettings(2, Rate(1e-3), 0.9, True, 0, "token"), FP32),
    "bf16": (TrainingSettings(2, Rate(1e-3), 0.9, True, 0, "token"), BF16),
    "training in bf16": (TrainingSettings(2, Rate(1e-3), 0.9, True, 0, "token"), TRAIN_BF16),
    "backtracking": (TrainingSettings(3, Rate(0.3), 0.9, True, 0), FP32),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_compensation_goes_on_to_the_same_bits(model, inputs, streams, name):
    settings, choices = TRAININGS[name]

    def run(callbacks):
        out = ListStream(N, (T, H), torch.float32)
        result = compensate_block(context_of(model, inputs, choices, callbacks).block(1), *streams, out, settings)
        return result.state, result.training, torch.stack([out[i] for i in range(N)])

    num_restored = 0
    for _at, expected, found, callbacks, uninterrupted in every_stop(run):
        assert same(found[0], expected[0])
        assert found[1] == expected[1]
        assert torch.equal(found[2], expected[2])
        num_restored += callbacks.kept is not None
        # Finished epochs are not trained again; only the pass that writes the targets is repeated.
        if callbacks.kept is not None and callbacks.kept.figures["course"]["is_over"]:
            assert callbacks.num_boundaries < uninterrupted.num_boundaries - settings.epochs * (N - 1)
    assert num_restored >= settings.epochs * (N - 1)
    if name == "backtracking":
        assert expected[1].kept_epoch < settings.epochs


@pytest.mark.parametrize("bits", [None, 4])
def test_refinement_goes_on_to_the_same_bits_also_while_it_runs_the_stream_on(model, inputs, streams, bits):
    biased, dense = streams
    target = ListStream(N, (T, H), torch.float32)
    settings = TrainingSettings(2, Rate(1e-3), 0.9, True, 0, "token")
    block, no_training = context_of(model, inputs, FP32).block(1), TrainingSettings(0, Rate(1e-3), 1, False, 0)
    compensate_block(block, biased, dense, target, no_training)
    pruner = pruner_named("sparsegpt", bits=bits)
    pruned = prune_block(block, pruner, budget_of(model, 0.5)[1], biased, output=None)

    def run(callbacks):
        out = ListStream(N, (T, H), torch.float32)
        block, output = context_of(model, inputs, FP32, callbacks).block(1), output_of(model, 1, torch.bfloat16, out)
        result = refine_block(block, pruned, biased, target, settings, output)
        return result.finished.state, result.training, torch.stack([out[i] for i in range(N)])

    for _at, expected, found, _callbacks, _uninterrupted in every_stop(run):
        assert same(found[0], expected[0])
        assert found[1] == expected[1]
        assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "alps", "magnitude"])
def test_pruning_goes_on_with_its_sums(model, inputs, streams, pruner):
    biased, _ = streams
    chosen = pruner_named(pruner, pattern=Pattern(2, 4) if pruner == "sparsegpt" else None)
    reads_data = chosen.needs_data

    def run(callbacks):
        out = ListStream(N, (T, H), torch.float32)
        block = context_of(model, inputs if reads_data else (), FP32, callbacks).block(1)
        output = output_of(model, 1, torch.float32, out if reads_data else None)
        budget = budget_of(model, 0.5)[1]
        result = prune_block(block, chosen, budget, biased if reads_data else None, output=output)
        masks = {name: layer.mask for name, layer in result.outcome.layers.items()}
        return result.finished.state, masks, result.finished.layers

    for at, expected, found, callbacks, _uninterrupted in every_stop(run):
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])
        assert found[2] == expected[2]
        if reads_data:
            assert callbacks.kept.figures["num_samples"] == min(at, N)


def test_evaluation_goes_on_after_the_last_group_of_windows(model, monkeypatch):
    monkeypatch.setattr("stages.metrics.streaming._TOKENS_AT_ONCE", 2 * T)
    windows = torch.randint(4, VOCAB, (5, T), generator=torch.Generator().manual_seed(0))

    def run(callbacks):
        return perplexity_of(model, windows, FP32, callbacks)

    passes = 2 * (model.num_blocks + 2)
    for at, expected, found, callbacks, uninterrupted in every_stop(run):
        assert found == expected
        assert len(callbacks.kept.figures["losses"]) == 2 * (at // passes)
        assert callbacks.num_boundaries == uninterrupted.num_boundaries - passes * (at // passes)


def test_groups_of_windows_do_not_change_the_perplexity(model, monkeypatch):
    windows = torch.randint(4, VOCAB, (5, T), generator=torch.Generator().manual_seed(0))
    at_once = perplexity_of(model, windows, FP32)
    monkeypatch.setattr("stages.metrics.streaming._TOKENS_AT_ONCE", 1)
    assert perplexity_of(model, windows, FP32) == at_once


def test_the_losses_of_another_text_are_not_gone_on_with(model, monkeypatch):
    monkeypatch.setattr("stages.metrics.streaming._TOKENS_AT_ONCE", 2 * T)
    one, other = (torch.randint(4, VOCAB, (4, T), generator=torch.Generator().manual_seed(i)) for i in range(2))
    callbacks = StoppingCallbacks(at=2 * (model.num_blocks + 2))
    with pytest.raises(Stopped):
        perplexity_of(model, one, FP32, callbacks)
    assert len(callbacks.kept.figures["losses"]) == 2
    again = perplexity_of(model, other, FP32, StoppingCallbacks(None, callbacks.kept))
    assert again == perplexity_of(model, other, FP32)


def test_backtracking_takes_back_an_epoch_that_made_it_worse_and_goes_on_at_a_lower_rate(model, inputs, streams):
    """Compared with the same schedule, written as a plain loop."""
    biased, dense = streams
    settings, choices = TRAININGS["backtracking"]
    out = ListStream(N, (T, H), torch.float32)
    result = compensate_block(context_of(model, inputs, choices).block(1), biased, dense, out, settings)

    block = model.load_block(1, torch.device("cpu"))
    calls = [model.load_ends(torch.device("cpu")).enter(inputs[i][None]).calls[1] for i in range(N)]
    (held_out,) = {0, 1, 2, 3, 4} - set(train_set := [0, 1, 3, 4])

    def loss(i):
        return block_loss(model.run_block(block, biased[i][None], calls[i]), out[i][None], "mse")

    from stages.training.seeding import generator_for

    block.requires_grad_(True)
    best, rate, adam = loss(held_out).item(), 1.0, torch.optim.Adam(block.parameters(), fused=True)
    best_state = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
    for epoch in itertools.count(1):
        if epoch > settings.epochs:
            break
        adam.param_groups[0]["lr"] = 0.3 * 0.9 ** (epoch - 1) * rate
        order = torch.randperm(4, generator=generator_for(0, "compensate", 1, epoch)).tolist()
        for i in (train_set[k] for k in order):
            adam.zero_grad()
            loss(i).backward()
            adam.step()
        if loss(held_out).item() < best:
            best = loss(held_out).item()
            best_state = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
        else:
            block.load_state_dict(best_state)
            rate *= 0.35
    assert rate < 1
    assert same(result.state, best_state)
