"""Tokens of a long text, piece by piece: the ids of the text at once, and no more work than needed."""

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stages.calibrate import calibrate
from stages.data import pieces
from stages.data.drawing import Drawing
from stages.data.pieces import Ends
from stages.data.registry import parse_source
from stages.data.tokenization import calibration_tokens, first_tokens, require_length, tokenize
from stages.in_memory import NullCallbacks

pytestmark = pytest.mark.long  # seconds of tokenizing, conversion or pruning

# What tokenizers treat specially: runs of spaces, line ends of both kinds, numbers, accents in two forms, emoji,
# scripts without spaces, the signs that stand for a space inside vocabularies, and special tokens.
STRANGE = [
    *(" ", "  ", "   ", "\n", "\r\n", "\n\n\n", "\t", " \n ", "\u00a0", "\u2028", "\u3000"),
    *("12345678", " 3.14", "don't", " we'll", "na\u00efve", "nai\u0308ve", "\u01c5", "\ufb01ne"),
    *(
        "\U0001f469\u200d\U0001f4bb",
        "\u4e2d\u6587\u5b57",
        "\u0e44\u0e17\u0e22",
        "\u2581",
        "\u0120",
        "<s>",
        "</s> ",
        "\0",
    ),
    *(" and the", " of words", ", so", "CamelCase", "a", " x", " "),
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def strange_text(num_parts, seed=0):
    rng = random.Random(seed)
    return "".join(rng.choice(STRANGE) for _ in range(num_parts))


def byte_level(pattern=None):
    core = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )


def llama2():
    """SentencePiece's BPE as Llama-2 and Gemma have it: the model sees the whole text as one word."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    # Trained on words, as SentencePiece does; used without pre-tokenization.
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return core, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )


def unigram():
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return core, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )


def trained(kind):
    build = {
        "gpt2": byte_level,
        "llama3": lambda: byte_level(LLAMA3),
        "llama2": llama2,
        "unigram": unigram,
        "unigram, one word": unigram,
        "prefix space": byte_level,
    }
    core, trainer = build[kind]()
    texts = [strange_text(4000, seed).replace("\u0120", " ").replace("\u2581", " ") for seed in range(4)]
    core.train_from_iterator(texts, trainer)
    if kind == "llama2":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.pre_tokenizer = None
    if kind == "unigram, one word":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "prefix space":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


KINDS = ("gpt2", "llama3", "llama2", "unigram", "unigram, one word", "prefix space")


class Counting:
    """A tokenizer that counts the characters it was given, and the calls."""

    def __init__(self, tokenizer):
        self._tokenizer, self.num_characters, self.num_calls = tokenizer, 0, 0

    def __call__(self, text, **options):
        self.num_characters += len(text)
        self.num_calls += 1
        return self._tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 700)
    monkeypatch.setattr(pieces, "_CONTEXT", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_text_at_once(kind, small_pieces):
    tokenizer = trained(kind)
    for seed in range(5):
        text = strange_text(6000, 100 + seed)
        counting, whole = Counting(tokenizer), tokenizer(text)["input_ids"]
        assert tokenize(counting, text).tolist() == whole
        # It was cut. Training gives Unigram vocabularies that differ in ties: with some, a cut in the middle fails.
        assert counting.num_calls > 3
        for needed in (1, 500, 3000, len(whole), len(whole) + 1):
            head = first_tokens(tokenizer, text, needed).tolist()
            assert head == whole[: len(head)]
            assert len(head) >= min(needed, len(whole))


@pytest.mark.parametrize("text", ["", "a", " ", "  a  ", "no cut\u4e2d" * 900, "word\n" * 900, "\u4e2d" * 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_a_place_to_cut(kind, text, small_pieces):
    tokenizer = trained(kind)
    assert tokenize(tokenizer, text).tolist() == tokenizer(text)["input_ids"]
    assert first_tokens(tokenizer, text, 10**9).tolist() == tokenizer(text)["input_ids"]


def test_a_vocabulary_with_tokens_of_several_words_is_not_cut(small_pieces):
    """Whether "of the" is one token depends on both sides of the space."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate("oftheandwrs\u2581")}
    words |= {"th": 20, "of": 21, "f\u2581": 22, "f\u2581th": 23}
    core = Tokenizer(
        models.BPE(vocab=words, merges=[("t", "h"), ("f", "\u2581"), ("f\u2581", "th")], unk_token="<unk>")
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer = Counting(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"))
    text = "of the words and " * 400
    assert tokenize(tokenizer, text).tolist() == tokenizer(text)["input_ids"]
    assert tokenizer.num_calls <= 5


FAR = {
    "split": (normalizers.NFC(), pre_tokenizers.Split(Regex(r"(?m)<q>.*?</q>|\w+|\s+"), "isolated")),
    "replaced": (normalizers.Replace(Regex(r"(?m)<q>.*?</q>"), "#"), pre_tokenizers.WhitespaceSplit()),
}


@pytest.mark.parametrize("kind", FAR)
def test_a_pattern_whose_end_is_pieces_away(kind, small_pieces):
    """A piece that holds <q> without its end is split in another way, and both sides of every cut agree."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = FAR[kind]
    words = "of words and the fox"
    core.train_from_iterator([f"{words} #"], trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    text = f"<q>{words * 300}</q> {' '.join([words] * 100)}"
    assert tokenize(tokenizer, text).tolist() == tokenizer(text)["input_ids"]


def test_where_both_sides_of_a_cut_disagree_the_text_is_tokenized_at_once(small_pieces):
    """Pairs of words: which ones pair up depends on the start of the text."""
    core, trainer = byte_level(r"(?:[^ ]+ [^ ]+ ?)")
    core.train_from_iterator(["ab abc "], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    text = " ".join("ab" if i % 3 else "abc" for i in range(2001))
    assert tokenize(tokenizer, text).tolist() == tokenizer(text)["input_ids"]


def test_a_piece_is_given_out_only_once_its_end_is_checked(small_pieces, monkeypatch):
    """Where the second cut fails, only the first piece is kept, and the rest comes from the text at once."""
    told, tokenizer, text = [], trained("gpt2"), strange_text(6000)
    agrees = pieces._Chunk.agrees_with
    monkeypatch.setattr(
        pieces._Chunk,
        "agrees_with",
        lambda self, other, cut: told.append(cut) or (len(told) < 2 and agrees(self, other, cut)),
    )
    first, rest = pieces.token_pieces(tokenizer, text)
    assert len(told) == 2
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert first.tolist() + rest.tolist() == whole
    assert len(first) == len(tokenizer(text[: told[0]], add_special_tokens=False)["input_ids"])


def test_ends_of_a_text():
    assert Ends.of(trained("gpt2")) == Ends((1,), (2,))
    plain = trained("unigram")
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert Ends.of(plain) == Ends((), ())


def test_contiguous_samples_take_as_long_from_a_long_text_as_from_a_short_one(tmp_path):
    text = strange_text(400_000)
    (tmp_path / "long.txt").write_text(text, newline="")
    (tmp_path / "short.txt").write_text(text[:50_000], newline="")
    tokenizer, whole, cost = trained("gpt2"), None, {}
    for name in ("short", "long"):
        counting, source = Counting(tokenizer), parse_source(f"text:{name}.txt")
        require_length(source, counting, "calibration", 32 * 128, 10**6, "")
        drawn = calibration_tokens(source, counting, Drawing(32, 128, "contiguous"))
        cost[name] = counting.num_characters
        whole = whole if whole is not None else torch.tensor(tokenizer(text)["input_ids"][: 32 * 128]).view(32, 128)
        assert torch.equal(drawn, whole)
    assert cost["long"] <= 1.2 * cost["short"]


def test_random_samples_read_a_text_once(tmp_path):
    text = strange_text(100_000)
    (tmp_path / "long.txt").write_text(text, newline="")
    counting, source = Counting(trained("gpt2")), parse_source("text:long.txt")
    require_length(source, counting, "calibration", 129, 10**6, "")
    calibration_tokens(source, counting, Drawing(8, 128, "random"))
    assert counting.num_characters < 1.3 * len(text)


def test_random_samples_show_progress_and_can_be_stopped(tmp_path, small_pieces):
    (tmp_path / "long.txt").write_text(strange_text(6000), newline="")
    trained("gpt2").save_pretrained(tmp_path / "model")
    model, source = SimpleNamespace(path=tmp_path / "model", trusts_code=False), parse_source("text:long.txt")
    watcher, told = NullCallbacks(), []
    watcher.report = lambda done, total, unit: told.append((done, total, unit))
    calibrate(source, model, Drawing(2, 8, "random"), watcher)
    assert len(told) > 5
    assert told[-1][0] == told[-1][1] == len(source.text("calibration"))

    def stop():
        raise KeyboardInterrupt

    watcher.check_stop = stop
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, model, Drawing(2, 8, "random"), watcher)


def test_progress_counts_characters(small_pieces):
    told = []
    text = strange_text(3000)
    tokenize(trained("gpt2"), text, lambda done, total: told.append((done, total)))
    assert len(told) > 5
    assert told == sorted(told)
    assert told[-1] == (len(text), len(text))
