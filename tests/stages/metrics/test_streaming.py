"""Perplexity over windows, computed with a few tokens' logits in memory at a time."""

import pytest
import torch

from stages.metrics.perplexity import PerplexityScore, perplexity
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.runtime import logit_slices
from stages.runtime.logit_slices import token_slices
from tests.blocks import perplexity_of
from tests.small_models import VOCAB, build, save


def test_slices_cover_every_token_once(monkeypatch):
    monkeypatch.setattr(logit_slices, "LOGITS_AT_ONCE", 60)
    assert [*token_slices(10, 20)] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert [*token_slices(2, 100)] == [slice(0, 1), slice(1, 2)], "one token at least"
    assert [*token_slices(0, 20)] == []


def test_logits_of_a_slice_give_the_perplexity_of_transformers(monkeypatch, tmp_path):
    original, sizes = build("llama"), []
    model = open_model(resolve(str(save(tmp_path / "m", "llama")), None))
    windows = torch.randint(4, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = perplexity([original(window[None], labels=window[None]).loss.item() for window in windows])
    total = PerplexityScore.total

    def watched(self, logits, following):
        sizes.append(tuple(logits.shape))
        return total(self, logits, following)

    monkeypatch.setattr(PerplexityScore, "total", watched)
    assert perplexity_of(model, windows) == pytest.approx(expected, rel=1e-5)
    assert sizes == [(19, VOCAB)] * 3
    monkeypatch.setattr(logit_slices, "LOGITS_AT_ONCE", 7 * VOCAB)
    sizes.clear()
    assert perplexity_of(model, windows) == pytest.approx(expected, rel=1e-5)
    assert sizes == [(7, VOCAB), (7, VOCAB), (5, VOCAB)] * 3
