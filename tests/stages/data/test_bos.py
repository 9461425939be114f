"""Where BOS stands in windows: each keeps its length, and BOS takes the first position."""

import pytest
import torch

from stages.calibrate import draw_tokens
from stages.data.bos import Framing, bos_of
from stages.data.drawing import Drawing
from stages.data.registry import parse_source
from stages.errors import UsageError
from tests.bos_model import BOS, bos_tokenizer
from tests.small_models import tokenizer

PLAIN = tokenizer()


@pytest.fixture
def text(words):
    return torch.tensor(PLAIN(words.read_text())["input_ids"])


def drawn(sampling, bos, skip=0, made=None):
    drawing = Drawing(4, 10, sampling, skip, seed=3, bos=bos)
    return draw_tokens(parse_source("text:words.txt"), made or bos_tokenizer(), drawing)


def test_contiguous_samples(text):
    stream = torch.cat([torch.tensor([BOS]), text])
    assert torch.equal(drawn("contiguous", "stream"), stream[:40].view(4, 10))
    assert torch.equal(drawn("contiguous", "none"), text[:40].view(4, 10))
    windows = drawn("contiguous", "window")
    assert windows[:, 0].tolist() == [BOS] * 4
    assert torch.equal(windows[:, 1:], text[:36].view(4, 9))
    assert torch.equal(drawn("contiguous", "window", skip=1)[0, 1:], text[9:18])


def test_random_samples(text):
    windows = drawn("random", "window")
    assert windows[:, 0].tolist() == [BOS] * 4
    everywhere = text.unfold(0, 9, 1)
    assert all((everywhere == window[1:]).all(1).any() for window in windows)
    assert not (drawn("random", "none") == BOS).any()


def test_a_tokenizer_that_adds_no_bos_is_asked_for_its_bos_token(words):
    assert drawn("contiguous", "window", made=tokenizer())[:, 0].tolist() == [PLAIN.bos_token_id] * 4
    nothing = tokenizer()
    nothing.bos_token = None
    assert bos_of(nothing) == ()
    with pytest.raises(UsageError, match="the tokenizer has no BOS token"):
        Framing.of(nothing, "window")


def test_a_window_without_room_for_text_is_refused():
    with pytest.raises(UsageError, match="leave no room for text"):
        Framing.of(bos_tokenizer(), "window").text_tokens(1)
    assert Framing.of(bos_tokenizer(), "stream").text_tokens(2) == 2
