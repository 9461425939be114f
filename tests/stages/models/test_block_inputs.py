"""What blocks get beside the hidden state: asked once where it depends on nothing, every time where it does."""

import pytest
import torch

from stages.machine.device import DeviceChoices
from stages.models.base import BlockCall, Entry
from stages.models.block_inputs import CachedBlockInputs
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from tests.small_models import FAMILIES, save

CPU = torch.device("cpu")
FP32 = DeviceChoices("cpu", "float32", 1, "highest", "here")


class CountingEnds:
    """An entrance that counts who passes; its calls hold the token ids, or do not."""

    def __init__(self, holds_tokens: bool, only_token: int | None = None) -> None:
        self.holds_tokens, self.only_token = holds_tokens, only_token
        self.num_entered = 0

    def enter(self, inputs):
        self.num_entered += 1
        mask = torch.ones(inputs.shape[1])
        told = {"mask": mask, "ids": inputs.clone() if self.holds_tokens else None}
        return Entry(inputs[..., None].float(), (BlockCall((), told),))

    def leave(self, inputs, hidden):
        raise NotImplementedError


def calls_of(ends):
    dropped = []
    return CachedBlockInputs(lambda: ends, lambda: dropped.append(True)), dropped


def test_the_model_is_asked_once_for_all_samples_of_a_shape_and_let_go():
    ends = CountingEnds(holds_tokens=False)
    calls, dropped = calls_of(ends)
    first = calls.of(torch.tensor([[5, 6, 7]]), FP32)
    asked = ends.num_entered
    assert calls.of(torch.tensor([[1, 1, 2]]), FP32) is first
    assert ends.num_entered == asked
    assert dropped
    calls.of(torch.tensor([[1, 1, 2], [3, 4, 5]]), FP32)
    assert ends.num_entered == asked + 1


def test_a_model_whose_calls_hold_the_tokens_is_asked_every_time():
    ends = CountingEnds(holds_tokens=True)
    calls, dropped = calls_of(ends)
    assert calls.depend_on_inputs(torch.tensor([[5, 6, 7]]), FP32)
    for ids in ([[1, 1, 2]], [[5, 6, 7]]):
        assert calls.of(torch.tensor(ids), FP32)[0].kwargs["ids"].tolist() == ids
    assert not dropped


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_that_is_known_tells_its_blocks_about_the_tokens(family, tmp_path):
    save(tmp_path, family)
    model = open_model(resolve(str(tmp_path)))
    ids = torch.randint(4, model.vocab_size, (1, 12), generator=torch.Generator().manual_seed(1))
    assert not model.calls(CPU).depend_on_inputs(ids, FP32)
    recorded = model.load_ends(CPU, "enter").enter(ids).calls
    for call, other in zip(model.calls(CPU).of(ids, FP32), recorded, strict=True):
        assert call.kwargs.keys() == other.kwargs.keys()
        for key, value in call.kwargs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other.kwargs[key])
