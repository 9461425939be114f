"""The original model writes samples: from prompts, by its own distribution, the same however often it is stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import generate_samples as stage
from stages.errors import NumericalError, UsageError
from stages.in_memory import ListStream, NullCallbacks
from stages.models.registry import open_model
from stages.models.resolve import resolve
from stages.runtime.sample_views import JoinedSamples
from stages.training.loss import split_samples
from tests import small_models, small_sam
from tests.blocks import context_of

N, T = 4, 40
EOS = 1  # of the small models


class Stopped(Exception):
    pass


class Stopping(NullCallbacks):
    """Stops at checkpoint number `at`, and resumes from `kept`."""

    def __init__(self, at=None, kept=None) -> None:
        super().__init__()
        self.at, self.kept, self.num_checkpoints, self.reports = at, kept, 0, []

    def restore(self):
        return self.kept

    def report(self, done, total, unit, **figures):
        assert 0 < done <= total
        self.reports.append(done)

    def checkpoint_now(self, make):
        self.num_checkpoints += 1
        if self.num_checkpoints == self.at:
            self.kept = make()
            raise Stopped


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(resolve(str(small_models.save(tmp_path_factory.mktemp("model") / "source", "llama"))))


@pytest.fixture
def several_chunks(model, monkeypatch):
    """Pieces of 16 tokens, three at once."""
    monkeypatch.setattr(stage, "_PIECE", 16)
    monkeypatch.setattr(stage, "_CACHE_BYTES", 3 * stage.cache_bytes(model, T))


def ids(model, num=N, tokens=T, first=None):
    given = torch.randint(4, model.vocab_size, (num, tokens), generator=torch.Generator().manual_seed(0))
    if first is not None:
        given[:, 0] = first
    return given


def written(model, given, num=N, **options):
    return generated(model, given, num, **options)[0]


def generated(model, given, num=N, seed=0, *, is_resident=True, holds_out=False, callbacks=None):
    """The samples, and how many of their tokens are said to be those of the prompts."""
    out = ListStream(num, (given.shape[1],), torch.long)
    context = context_of(model, given, callbacks=callbacks)
    num_real = stage.generate_samples(context, out, seed, holds_out=holds_out, is_resident=is_resident)
    return torch.stack([out[index] for index in range(num)]), num_real


def test_a_sample_begins_as_the_given_one_and_never_ends(model):
    given = ids(model)
    found = written(model, given, num=2 * N)
    assert torch.equal(found[:, :10], given[:, :10].repeat(2, 1)), "a fourth of so short a sample is the prompt"
    assert not torch.equal(found[:N, 10:], given[:, 10:])
    assert not torch.equal(found[:N], found[N:]), "a prompt that is used twice is written on twice"
    assert not (found[:, 10:] == EOS).any()
    assert torch.equal(found, written(model, given, num=2 * N))
    assert not torch.equal(found, written(model, given, num=2 * N, seed=1))


def test_tokens_have_the_probabilities_that_the_model_gives_them(model):
    given = ids(model, 1, 5)
    num = 6000
    found = written(model, given, num=num)[:, 1]
    hidden = model.load_ends(torch.device("cpu")).enter(given[:, :1])
    x = hidden.hidden
    for index in range(model.num_blocks):
        x = model.run_block(model.load_block(index, torch.device("cpu")), x, hidden.calls[index])
    logits = model.load_ends(torch.device("cpu")).leave(given[:, :1], x)[0, -1].double()
    logits[EOS] = -torch.inf
    expected = logits.softmax(0) * num
    counts = torch.bincount(found, minlength=model.vocab_size)
    usual = expected > 5
    assert usual.sum() > 100
    squares = (counts[usual] - expected[usual]) ** 2 / expected[usual]
    # Mean 1 a token, standard deviation sqrt(2 / tokens).
    assert abs(float(squares.mean()) - 1) < 5 * (2 / int(usual.sum())) ** 0.5
    other = (counts[usual] - num / model.vocab_size) ** 2 / (num / model.vocab_size)
    assert float(other.mean()) > 1.5, "this test would not see a wrong distribution"


def test_a_uniform_number_falls_on_the_token_whose_share_holds_it(monkeypatch):
    """Against the inverse of the distribution function, token by token, in 64 bits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 700, generator=generator)
    logits[:, ::7] = -torch.inf
    logits[:, 600:] = -torch.inf  # whole groups are left out, too
    upto = logits.double().softmax(-1).cumsum(-1)
    for shares in (
        torch.linspace(0, 1 - 2**-53, 50, dtype=torch.float64),
        torch.rand(50, generator=generator).double(),
    ):
        monkeypatch.setattr(torch, "rand", lambda *_args, shares=shares, **_more: shares)
        tokens = stage.drawn(logits, generator)
        assert torch.isfinite(logits[torch.arange(50), tokens]).all(), "a token that is left out is never drawn"
        below = torch.cat([torch.zeros(50, 1, dtype=torch.float64), upto], 1)[torch.arange(50), tokens]
        above = upto[torch.arange(50), tokens]
        assert (below - 1e-6 <= shares).all()
        assert (shares <= above + 1e-6).all()
    logits[3, 5] = torch.nan
    assert stage.drawn(logits, generator) is None
    logits[3, 5] = torch.inf
    assert stage.drawn(logits, generator) is None


def test_pieces_begin_with_the_tokens_at_their_place(model, several_chunks):
    assert stage.pieces_of(2, 40)[:4] == [
        stage.Piece(0, 0, 13), stage.Piece(0, 13, 13), stage.Piece(0, 26, 14), stage.Piece(1, 0, 13)
    ]  # fmt: skip
    given = ids(model)
    found, num_real = generated(model, given)
    for start in (0, 13, 26):
        assert torch.equal(found[:, start : start + 3], given[:, start : start + 3])
    assert num_real == N * 3 * 3


def test_a_common_first_token_stands_before_every_piece(model, several_chunks, monkeypatch):
    given = ids(model, first=0)
    read = []
    build = type(model).generation_model

    def watching(self, device, fetch):
        whole = build(self, device, fetch)
        generate = whole.generate
        whole.generate = lambda prompts, **more: read.append(prompts) or generate(prompts, **more)
        return whole

    monkeypatch.setattr(type(model), "generation_model", watching)
    found, num_real = generated(model, given)
    assert num_real == N * (4 + 3 + 3), "BOS counts where it stands in the sample"
    prompts = torch.cat(read)
    assert (prompts[:, 0] == 0).all()
    assert prompts.shape == (12, 4)
    assert torch.equal(found[:, 0:4], given[:, 0:4])
    assert torch.equal(found[:, 13:16], given[:, 13:16])
    assert (found[:, 13] != 0).all()


def test_held_out_samples_are_no_prompts(model):
    given = ids(model, 20)
    trained, held_out = split_samples(20, holds_out=True)
    assert held_out
    found = written(model, given, num=20, holds_out=True)
    prompts = [tuple(sample[:10].tolist()) for sample in given]
    begun = {tuple(sample[:10].tolist()) for sample in found}
    assert begun == {prompts[index] for index in trained}
    assert written(model, given, num=20).tolist() != found.tolist()


def test_what_the_settings_of_the_original_say_of_writing_changes_nothing(model, tmp_path):
    given, expected = ids(model), written(model, ids(model))
    folder = small_models.save(tmp_path / "model", "llama")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"use_cache": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "output_hidden_states": True}
    path.write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 2, "temperature": 0.2}))
    assert torch.equal(written(open_model(resolve(str(folder))), given), expected)


def test_one_block_in_memory_writes_what_all_write(model, several_chunks):
    given = ids(model)
    callbacks = NullCallbacks()
    assert torch.equal(written(model, given, is_resident=False, callbacks=callbacks), written(model, given))
    assert callbacks.warnings == [
        "the blocks of the original do not fit into memory together: to generate 4 samples, each is read 44 times"
    ]


def test_stopped_after_any_texts_it_goes_on_with_the_next(model, several_chunks):
    given = ids(model)
    quiet = Stopping()
    expected = written(model, given, callbacks=quiet)
    assert quiet.num_checkpoints == 4
    for at in range(1, 5):
        stopped = Stopping(at)
        with pytest.raises(Stopped):
            written(model, given, callbacks=stopped)
        resumed = Stopping(kept=stopped.kept)
        assert torch.equal(written(model, given, callbacks=resumed), expected)
        assert len(resumed.reports) == (4 - at) * 11


def test_a_stop_is_asked_for_at_every_token(model):
    class Impatient(NullCallbacks):
        left = 3

        def check_stop(self):
            self.left -= 1
            if not self.left:
                raise Stopped

    with pytest.raises(Stopped):
        written(model, ids(model), callbacks=Impatient())


def test_random_numbers_of_others_stay_as_they_were(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    written(model, ids(model))
    assert torch.equal(torch.rand(3), expected)


def test_what_writes_no_text_is_refused_and_a_fault_of_a_family_says_how_to_do_without(model, tmp_path, monkeypatch):
    sam = open_model(resolve(str(small_sam.save(tmp_path / "sam"))))
    assert not stage.generates_by_default(sam, 16)
    with pytest.raises(UsageError, match="writes no text"):
        written(sam, ids(model))

    def fails(*args, **kwargs):
        raise ValueError("a state of another shape")

    build = type(model).generation_model

    def broken(self, device, fetch):
        whole = build(self, device, fetch)
        whole.generate = fails
        return whole

    faulty = NullCallbacks()
    faulty.report = None  # a fault of the code of this package is none of the family's
    with pytest.raises(TypeError):
        written(model, ids(model), callbacks=faulty)
    monkeypatch.setattr(type(model), "generation_model", broken)
    with pytest.raises(UsageError, match=r"a state of another shape.*--distill-generated 0"):
        written(model, ids(model))


@pytest.mark.parametrize("end", [[], [1, 2], None, 5000])
def test_any_end_of_text_token_is_left_out(tmp_path, end):
    folder = small_models.save(tmp_path / "model", "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end}))
    model = open_model(resolve(str(folder)))
    found = written(model, ids(model))
    ends = end if isinstance(end, list) else [end]
    assert not any((found[:, 10:] == one).any() for one in ends if one is not None)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    folder = small_models.save(tmp_path / "model", "opt")
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.decoder.final_layer_norm.bias"][3] = float("nan")
    save_file(state, path, {"format": "pt"})
    model = open_model(resolve(str(folder)))
    with pytest.raises(NumericalError, match="gives logits that are NaN"):
        written(model, ids(model))


def test_a_model_with_a_large_cache_writes_nothing_by_default(model, monkeypatch):
    assert stage.generates_by_default(model, 2048)
    monkeypatch.setattr(stage, "_CACHE_BYTES", 16 * stage.cache_bytes(model, 2048) - 1)
    assert not stage.generates_by_default(model, 2048)
    assert stage.cache_bytes(model, 2048) == 256 * 3 * 2 * 32 * 4  # tokens, blocks, keys and values, width, fp32


def test_joined_samples_are_those_of_one_set_and_then_of_the_next():
    sets = [torch.arange(3), torch.arange(10, 12), torch.arange(20, 21)]
    joined = JoinedSamples(sets)
    assert [int(joined[index]) for index in range(len(joined))] == [0, 1, 2, 10, 11, 20]
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            joined[outside]
