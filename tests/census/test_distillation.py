"""Every family that can be pruned can be distilled: streamed and resident with the same bits, the head in slices."""

import pytest
import torch

from stages.distill import DistillSettings
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.runtime import logit_slices
from stages.training import end_loss
from stages.training.rates import Rate
from tests.census.families import CENSUS
from tests.distillation import Case, require_same

SETTINGS = DistillSettings(epochs=1, lr=Rate(1e-3), batch=2, holds_out=True, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in CENSUS if entry.verdict.word == "works"], ids=lambda e: e.name)
def test_streamed_and_resident_are_bit_identical_and_slices_of_the_head_are_the_whole(entry, tmp_path, monkeypatch):
    model = open_model(resolve(str(entry.save(tmp_path / "source"))))
    case = Case(model, 0.5, num_samples=3)
    require_same(
        case.distilled(is_resident=False, settings=SETTINGS), case.distilled(is_resident=True, settings=SETTINGS)
    )
    if model.task != "language":
        return
    ends, tokens, target = model.load_ends(torch.device("cpu"), "all"), case.inputs[0][None], case.teacher[0][None]
    hidden = target + 0.1 * target.std() * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    whole = end_loss.Divergence.of(ends, tokens, hidden, target, model.vocab_size, needs_gradient=True)
    monkeypatch.setattr(logit_slices, "LOGITS_AT_ONCE", 5 * model.vocab_size)
    sliced = end_loss.Divergence.of(ends, tokens, hidden, target, model.vocab_size, needs_gradient=True)
    assert sliced.value == pytest.approx(whole.value, rel=1e-4, abs=1e-7)
    torch.testing.assert_close(sliced.gradient, whole.gradient, rtol=1e-3, atol=1e-6)
