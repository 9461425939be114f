"""Where BOS stands in windows: each keeps its length, and BOS takes the first position."""

import json

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


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
LLAMA = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TWO_CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    [{"role": "user", "content": "?"}],
]


def chat_samples(made, bos, length, num_samples, folder):
    """The text of samples of this number of tokens, drawn from two conversations."""
    (folder / "two.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in TWO_CHATS))
    drawing = Drawing(num_samples, length, "contiguous", 0, 0, bos=bos)
    return [made.decode(ids) for ids in draw_tokens(parse_source("jsonl:two.jsonl"), made, drawing)]


@pytest.mark.parametrize("bos", ["stream", "none"])
def test_a_role_marker_that_is_the_bos_token_stays_before_every_message(tmp_path, bos):
    """SmolLM2: its bos_token is <|im_start|>, and its tokenizer adds none."""
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<|im_start|>"})
    made.chat_template = CHATML
    first = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    expected = f"{first}\n\n<|im_start|>user\n?<|im_end|>\n"
    assert chat_samples(made, bos, len(made(expected)["input_ids"]), 1, tmp_path) == [expected]


@pytest.mark.parametrize(
    ("bos", "length", "expected"),
    [
        ("stream", 31, ["<s>[user]Hi[assistant]Ho\n\n[user]?"]),
        ("none", 30, ["[user]Hi[assistant]Ho\n\n[user]?"]),
        ("window", 16, ["<s>[user]Hi[assist", "<s>ant]Ho\n\n[user]?"]),
    ],
)
def test_bos_of_a_template_is_not_doubled(tmp_path, bos, length, expected):
    """Llama 3: the template writes BOS at the head of a conversation, and the tokenizer adds it to a text."""
    made = bos_tokenizer()
    made.chat_template = LLAMA
    assert chat_samples(made, bos, length, len(expected), tmp_path) == expected


@pytest.mark.parametrize("bos", ["stream", "none"])
def test_bos_of_a_template_stays_where_the_tokenizer_adds_none(tmp_path, bos):
    """OLMo 2: each conversation begins with the BOS token that its template writes."""
    made = tokenizer()
    made.chat_template = LLAMA
    assert chat_samples(made, bos, 32, 1, tmp_path) == ["<s>[user]Hi[assistant]Ho\n\n<s>[user]?"]
