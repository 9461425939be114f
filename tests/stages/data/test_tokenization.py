"""Calibration and evaluation text: what is drawn, how it is cut, and what is refused."""

import math
import random

import pytest
import torch

from stages.data.drawing import Drawing
from stages.data.hub_text import HubText
from stages.data.registry import parse_source
from stages.data.tokenization import calibration_tokens, evaluation_tokens, tokenize
from stages.errors import ResourceError, UsageError
from stages.metrics.language import windows
from stages.metrics.perplexity import perplexity, window_loss
from tests.small_models import tokenizer

TOKENIZER = tokenizer()


def ids(text):
    return torch.tensor(TOKENIZER(text)["input_ids"])


def test_a_text_file_is_cut_into_windows_from_its_start(words):
    source = parse_source("text:words.txt")
    assert source.name == f"text:{words.resolve()}"
    whole = ids(words.read_text())
    drawn = calibration_tokens(source, TOKENIZER, Drawing(3, 100, "contiguous", skip=2))
    assert torch.equal(drawn, whole[200:500].view(3, 100))
    with pytest.raises(UsageError, match=rf"has {len(whole):,} tokens; 50 samples of 100 need 5,000"):
        calibration_tokens(source, TOKENIZER, Drawing(50, 100, "contiguous"))


def test_random_windows_depend_on_the_seed_alone_and_lie_in_the_text(words):
    source, whole = parse_source("text:words.txt"), ids(words.read_text())
    drawn = calibration_tokens(source, TOKENIZER, Drawing(4, 64, "random", seed=5))
    assert torch.equal(drawn, calibration_tokens(source, TOKENIZER, Drawing(4, 64, "random", seed=5)))
    assert not torch.equal(drawn, calibration_tokens(source, TOKENIZER, Drawing(4, 64, "random", seed=6)))
    assert torch.equal(drawn[1:], calibration_tokens(source, TOKENIZER, Drawing(3, 64, "random", skip=1, seed=5)))
    everywhere = whole.unfold(0, 64, 1)
    assert all((everywhere == window).all(1).any() for window in drawn)


def test_c4_draws_as_sparsegpts_code_does(monkeypatch):
    documents = [f"document {i} " * (i % 7) for i in range(200)]
    monkeypatch.setattr(HubText, "hub_rows", lambda source, use: documents)
    drawn = calibration_tokens(parse_source("c4"), TOKENIZER, Drawing(6, 40, "random", seed=0))
    rng, expected = random.Random(0), []
    while len(expected) < 6:
        tokens = ids(documents[rng.randint(0, len(documents) - 1)])
        if len(tokens) > 40:
            start = rng.randint(0, len(tokens) - 40 - 1)
            expected.append(tokens[start : start + 40])
    assert torch.equal(drawn, torch.stack(expected))
    with pytest.raises(UsageError, match=r"of 2,000 documents drawn from c4, 0 have more than 500 tokens"):
        calibration_tokens(parse_source("c4"), TOKENIZER, Drawing(6, 500, "random", seed=0))


def test_hub_texts_are_joined_as_the_field_does(monkeypatch):
    monkeypatch.setattr(HubText, "hub_rows", lambda source, use: ["a\n", "", f"{source.kind} {use}"])
    assert parse_source("wikitext2").text("evaluation") == "a\n\n\n\n\nwikitext2 evaluation"
    assert parse_source("ptb").text("calibration") == "a\n  ptb calibration"
    monkeypatch.setattr(HubText, "hub_rows", lambda source, use: [str(i) for i in range(3000)])
    assert parse_source("c4").text("evaluation").split() == [str(i) for i in range(1100)]
    assert parse_source("c4").max_windows == 256


def test_the_embedded_corpus_has_two_disjoint_parts():
    source = parse_source("pydocs")
    calibration, evaluation = source.documents("calibration"), source.documents("evaluation")
    assert not set(calibration) & set(evaluation)
    sizes = [sum(map(len, part)) for part in (calibration, evaluation)]
    assert 0.1 < sizes[1] / sum(sizes) <= 0.15
    assert len(calibration) + len(evaluation) > 70


def test_the_hub_out_of_reach_is_said_quickly(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(HubText, "cached_rows", lambda source, use: None)
    with pytest.raises(ResourceError, match=r"wikitext2 comes from the Hugging Face hub.*no route to host.*pydocs"):
        parse_source("wikitext2").text("evaluation")
    with pytest.raises(ResourceError, match="out of reach"):
        parse_source("c4").check()


def test_a_file_without_text_in_front_gets_the_hint(words):
    with pytest.raises(UsageError, match=r"for a file, text:words\.txt"):
        parse_source("words.txt")


def test_windows_drop_the_tail_and_are_limited():
    tokens = torch.arange(107)
    assert windows(tokens, 25).tolist() == torch.arange(100).view(4, 25).tolist()
    assert windows(tokens, 25, max_tokens=60).shape == (2, 25)
    assert windows(tokens, 25, max_windows=3).shape == (3, 25)
    with pytest.raises(UsageError, match="107 tokens do not fill one window of 200"):
        windows(tokens, 200)


def test_perplexity_in_closed_form():
    """A model that gives every next token probability 1/8 has perplexity 8, over windows of any length."""
    logits, window = torch.zeros(1, 10, 8), torch.randint(0, 8, (1, 10))
    assert window_loss(logits, window) == pytest.approx(math.log(8))
    assert perplexity([math.log(8), math.log(2)]) == pytest.approx(4)  # mean of windows first, then exp
    assert perplexity([1e6]) == math.inf
    certain = torch.full((1, 3, 4), -100.0)
    certain[0, 0, 2] = certain[0, 1, 1] = 100.0
    assert window_loss(certain, torch.tensor([[3, 2, 1]])) == pytest.approx(0, abs=1e-6)


def test_evaluation_tokens_are_the_whole_text_once(words):
    assert torch.equal(evaluation_tokens(parse_source("text:words.txt"), TOKENIZER), ids(words.read_text()))
    assert tokenize(TOKENIZER, "").numel() == 0
