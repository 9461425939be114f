"""Which samples the end loss is measured on, and what of them a training has seen."""

import pytest
import torch

from stages.in_memory import ListScratch, NullCallbacks
from stages.measure_end_loss import measure_end_loss, measured_samples, occurring
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.training import trainer
from stages.training.rates import Rate
from stages.training.student import Resident
from tests.blocks import budget_of, context_of, pruner_named
from tests.distillation import FP32, Case, ids
from tests.small_models import save


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(open_model(resolve(str(save(tmp_path_factory.mktemp("m") / "m", "llama")))), num_samples=33)


def test_no_training_sees_the_samples_that_are_measured(case, monkeypatch):
    """Watched where trainings take their samples."""
    from stages.lamp import LampSettings, lamp
    from stages.training.trainer import TrainingSettings

    measured = measured_samples(33)
    assert len(measured) == 2
    updated: set[int] = set()
    update = Resident.update
    monkeypatch.setattr(
        Resident, "update", lambda self, numbers, lr: updated.update(numbers) or update(self, numbers, lr)
    )
    case.distilled(is_resident=True)
    assert updated == set(range(33)) - set(measured)

    orders = []
    draw = torch.randperm
    monkeypatch.setattr(trainer.torch, "randperm", lambda n, **rest: orders.append(n) or draw(n, **rest))
    training = TrainingSettings(1, Rate(1e-4), 1.0, True, 0, "token")
    settings = LampSettings(pruner_named("sparsegpt"), training, training)
    list(lamp(context_of(case.model, case.inputs), budget_of(case.model, 0.5), settings))
    assert set(orders) == {33 - len(measured)}


def test_the_only_sample_is_measured_itself():
    assert measured_samples(1) == [0]


@pytest.mark.parametrize("num_samples", [2, 15, 16, 17, 31, 32, 128])
def test_one_sample_in_16_is_measured(num_samples):
    assert len(measured_samples(num_samples)) == max(num_samples // 16, 1)


def test_a_model_is_not_far_from_itself(case):
    found = measure_end_loss(context_of(case.model, case.inputs, FP32), case.model, ListScratch(), shares_ends=True)
    assert (found.loss, found.num_samples, found.num_tokens) == ("kl", 2, 2 * 12)
    assert found.value == pytest.approx(0, abs=1e-7)
    again = measure_end_loss(context_of(case.model, ids(case.model, 33)), case.model, ListScratch(), shares_ends=False)
    assert again.samples_sha256 == found.samples_sha256
    fewer = measure_end_loss(context_of(case.model, ids(case.model, 17)), case.model, ListScratch(), shares_ends=True)
    assert fewer.samples_sha256 != found.samples_sha256


def test_samples_that_occur_in_another_set_are_found_bit_for_bit():
    samples = [torch.arange(4) + number for number in range(6)]
    others = [samples[5].clone(), torch.tensor([0, 1, 2, 9]), samples[2].clone(), samples[1].float()]
    assert occurring(samples, range(6), others, range(4)) == [2, 5]
    assert occurring(samples, [1, 5], others, range(4)) == [5]
    assert occurring(samples, range(6), others, [1, 3]) == []


class Stopping(NullCallbacks):
    """Asks the work to stop."""

    def check_stop(self):
        raise KeyboardInterrupt


def test_it_stops_at_a_batch_boundary(case):
    with pytest.raises(KeyboardInterrupt):
        measure_end_loss(
            context_of(case.model, case.inputs, FP32, Stopping()), case.model, ListScratch(), shares_ends=True
        )


def test_one_block_is_in_memory_at_a_time(case, monkeypatch):
    import weakref

    alive: list[weakref.ref] = []
    load = type(case.model).load_block

    def watched(self, *arguments, **rest):
        assert not [one for one in alive if one() is not None], "a block is still there"
        block = load(self, *arguments, **rest)
        alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(type(case.model), "load_block", watched)
    measure_end_loss(context_of(case.model, case.inputs, FP32), case.model, ListScratch(), shares_ends=True)
    assert len(alive) == 2 * case.model.num_blocks
