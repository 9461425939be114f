"""A block whose statistics are collected in several passes has the bits of one whose statistics fit in one pass."""

import contextlib
import itertools
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from stages.capture import capture
from stages.in_memory import ListStream, NullCallbacks
from stages.models.experts import only_experts
from stages.models.in_memory import open_in_memory
from stages.prune_block import prune_block
from stages.pruners.sparsegpt import SparseGPT
from stages.pruners.statistics import HessianSum
from stages.runtime.layer_inputs import LayerInput, collect, find_inputs
from tests.blocks import FP32, budget_of, context_of, output_of, pruner_named
from tests.small_experts import NUM_EXPERTS, build
from tests.small_models import VOCAB
from tests.small_models import build as build_dense
from tests.stages.test_stage_checkpoints import Stopped, StoppingCallbacks, every_stop, same

T, H = 16, 32
# An expert gets four tokens of a sample on average, and has 24 to 48 input channels.
NUM_SAMPLES = {"too few tokens for all": 2, "too few for some": 12, "enough": 26}


@dataclass
class Setup:
    """A model and the biased input of block 1."""

    model: object
    inputs: ListStream
    biased: ListStream
    goal: object = 0.5

    def prune(self, pruner, room_bytes, callbacks=None, *, dtype=torch.bfloat16, output=True):
        """What pruning block 1 gives: everything that a step stores, and the callbacks."""
        told = callbacks or NullCallbacks()
        out = ListStream(len(self.inputs), self.biased[0].shape, torch.float32)
        context = context_of(self.model, self.inputs, FP32, told).block(1)
        result = prune_block(
            context,
            pruner,
            budget_of(self.model, self.goal)[1],
            self.biased,
            output=output_of(self.model, 1, dtype, out) if output else None,
            room_bytes=room_bytes,
        )
        tensors = {f"mask.{name}": layer.mask for name, layer in result.outcome.layers.items()}
        tensors |= result.state or result.finished.state
        tensors |= {f"out.{i}": out[i] for i in range(len(self.inputs)) if output}
        layers = result.finished.layers if output else [*result.outcome.layers]
        return tensors, layers, result.experts

    def inputs_of(self, pruner, *, with_digests=False):
        """The context of the block, the block, its layers, their distinct inputs."""
        context = context_of(self.model, self.inputs).block(1)
        block = context.load()
        modules = {info.path: block.get_submodule(info.path) for info in self.model.layers(1)}
        return context, block, modules, find_inputs(context, block, modules, self.biased, with_digests=with_digests)

    def size_bytes(self, pruner):
        """The size of all statistics of the block."""
        return sum(4 * pruner.statistics().num_numbers(one.cols) for one in self.inputs_of(pruner)[3])


def setup_of(model, num_samples, length=T):
    """Setup with random samples; the biased stream is the dense one with noise."""
    model = open_in_memory(model)
    inputs, dense, biased = (
        ListStream(num_samples, shape, dtype)
        for shape, dtype in (((length,), torch.long), *[((length, model.hidden_size), torch.float32)] * 2)
    )
    for i in range(num_samples):
        inputs.write(i, torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(i)))
    capture(context_of(model, inputs), ListStream(num_samples, (length, H), torch.float32), dense)
    for i in range(num_samples):
        biased.write(i, dense[i] + 0.1 * torch.randn(length, H, generator=torch.Generator().manual_seed(i)))
    return Setup(model, inputs, biased)


def equal(found, expected):
    return same(found[0], expected[0]) and found[1:] == expected[1:]


def announced(callbacks):
    """The number of passes in the message."""
    told = [message for message in callbacks.warnings if "passes over its inputs" in message]
    assert len(told) <= 1
    return int(told[0].split(": ")[1].split()[0]) if told else 1


FAMILIES, METHODS = ("mixtral", "deepseek-v3", "gpt-oss", "qwen2-moe"), ("sparsegpt", "alps", "wanda")
QUICK = [("mixtral", "sparsegpt", tokens) for tokens in NUM_SAMPLES] + [("deepseek-v3", "wanda", "too few for some")]
EVERY = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(FAMILIES, METHODS, NUM_SAMPLES)
]


@pytest.mark.long
@pytest.mark.parametrize(("family", "method", "tokens"), EVERY)
def test_groups_of_experts_give_the_bits_of_one_pass(family, method, tokens):
    setup = setup_of(build(family), NUM_SAMPLES[tokens])
    pruner = pruner_named(method)
    one = setup.prune(pruner, None)
    assert one[2].num_short in {"too few tokens for all": [8], "too few for some": range(1, 8)}.get(tokens, range(8))
    for share, fewest, most in ((0, 2 * NUM_EXPERTS + 2, 100), (0.3, 4, 6), (0.6, 2, 3)):
        callbacks = NullCallbacks()
        assert equal(setup.prune(pruner, int(share * setup.size_bytes(pruner)), callbacks), one), share
        assert fewest <= announced(callbacks) <= most


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"bits": 4}),
        ("mixtral", {"calibrates_all_experts": True}),
        ("qwen2-moe", {"calibrates_all_experts": True}),  # its shared expert reads what all others read
    ],
    ids=str,
)
def test_the_bits_do_not_depend_on_passes_with_options_for_layers(family, options):
    setup = setup_of(build(family), 4)
    pruner = pruner_named("sparsegpt", **options)
    one = setup.prune(pruner, None, dtype=torch.float32)
    assert equal(setup.prune(pruner, 1, dtype=torch.float32), one)
    unfinished = setup.prune(pruner, None, output=False)
    assert equal(setup.prune(pruner, 1, output=False), unfinished)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "falcon", "opt"])
def test_dense_blocks_are_pruned_in_passes_likewise(family):
    setup = setup_of(build_dense(family), 4)
    pruner = pruner_named("sparsegpt")
    one = setup.prune(pruner, None)
    callbacks = NullCallbacks()
    assert equal(setup.prune(pruner, 1, callbacks), one)
    assert announced(callbacks) >= 3
    quiet = NullCallbacks()
    assert equal(setup.prune(pruner, 10**9, quiet), one)
    assert not quiet.warnings


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "method", "room", "step"),
    [
        ("mixtral", "sparsegpt", 0.3, 3),
        pytest.param("mixtral", "sparsegpt", 0.3, 1, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", "wanda", 0.0, 1, marks=pytest.mark.slow),
    ],
)
def test_a_stop_in_any_pass_goes_on_to_the_same_bits(family, method, room, step):
    setup = setup_of(build(family), 4, 3 * T)
    pruner = pruner_named(method)
    room_bytes = int(room * setup.size_bytes(pruner))
    one = setup.prune(pruner, None)
    assert 0 < one[2].num_short < NUM_EXPERTS

    def run(callbacks):
        return setup.prune(pruner, room_bytes, callbacks)

    num_passes = set()
    for at, expected, found, again, uninterrupted in every_stop(run, step=step):
        assert equal(expected, one)
        assert equal(found, one), at
        # Nothing is done twice: the progress continues where it stopped.
        assert again.num_boundaries == uninterrupted.num_boundaries - min(at, uninterrupted.num_boundaries - 4)
        assert again.done == sorted(again.done)
        assert again.done[-1] == uninterrupted.done[-1]
        num_passes.add(again.kept.figures["num_passes"])
    assert num_passes == set(range(max(num_passes) + 1))
    assert max(num_passes) >= 4


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [(0.3, None), (0.3, 0.0), (0.0, 0.5), (None, 0.3)])
def test_a_step_may_be_resumed_with_more_or_less_room(first, second):
    setup = setup_of(build("mixtral"), 4, 3 * T)
    pruner = pruner_named("sparsegpt")
    rooms = [None if share is None else int(share * setup.size_bytes(pruner)) for share in (first, second)]
    one = setup.prune(pruner, None)
    uninterrupted = StoppingCallbacks()
    setup.prune(pruner, rooms[0], uninterrupted)
    for at in range(1, uninterrupted.num_boundaries, 9):
        callbacks = StoppingCallbacks(at)
        with pytest.raises(Stopped):
            setup.prune(pruner, rooms[0], callbacks)
        assert equal(setup.prune(pruner, rooms[1], StoppingCallbacks(None, callbacks.kept)), one), at


class Watched(HessianSum):
    """Knows how many bytes of such statistics are alive."""

    alive: ClassVar = weakref.WeakSet()
    most = 0

    def __init__(self, cols, device):
        super().__init__(cols, device)
        Watched.alive.add(self)

    def add(self, x):
        Watched.most = max(Watched.most, sum(4 * len(one.state()[0]) ** 2 for one in Watched.alive))
        super().add(x)


@pytest.mark.long
@pytest.mark.parametrize("num_samples", [2, 12])
def test_statistics_of_a_pass_keep_within_their_room(monkeypatch, num_samples):
    setup = setup_of(build("mixtral"), num_samples)
    pruner = pruner_named("sparsegpt")
    monkeypatch.setattr(SparseGPT, "statistics", classmethod(lambda cls: Watched))
    size, largest = setup.size_bytes(pruner), 4 * 48**2
    for room_bytes in (None, size, size // 2, size // 4, 2 * largest):
        Watched.alive.clear()
        Watched.most = 0
        setup.prune(pruner, room_bytes)
        assert Watched.most == size if room_bytes in (None, size) else Watched.most <= room_bytes
        assert Watched.most > (room_bytes or 0) // 2
    assert not Watched.alive


def test_passes_after_the_first_compute_only_the_experts_that_they_collect(monkeypatch):
    setup = setup_of(build("mixtral"), 2)
    wanted = []

    @contextlib.contextmanager
    def watched(block, experts):
        wanted.append(experts)
        with only_experts(block, experts):
            yield

    monkeypatch.setattr("stages.prune_block.only_experts", watched)
    pruner = pruner_named("wanda")
    setup.prune(pruner, None)
    assert wanted == [None]
    wanted.clear()
    setup.prune(pruner, setup.size_bytes(pruner) // 4)
    assert len(wanted) > 4
    assert wanted[0] is None
    assert all(0 < len(experts) < NUM_EXPERTS for experts in wanted[1:-1])


@torch.no_grad()
def test_inputs_are_found_in_the_order_of_the_forward_pass():
    setup = setup_of(build("qwen2-moe"), 1)
    _, _, _, found = setup.inputs_of(pruner_named("sparsegpt"))
    attention, experts, shared = "self_attn.", "mlp.experts.", "mlp.shared_expert."
    assert [one.paths for one in found if not one.peers and one.paths != ("mlp.gate",)] == [
        tuple(f"{attention}{name}_proj" for name in "qkv"),
        (f"{attention}o_proj",),
        (f"{shared}gate_proj", f"{shared}up_proj", "mlp.shared_expert_gate"),
        (f"{shared}down_proj",),
    ]
    places = [[*group] for place, group in itertools.groupby(found, lambda one: one.place) if place[0].count("*")]
    names = [[path for one in place for path in one.paths] for place in places]
    assert names == [
        [f"{experts}{number}.{name}" for number in range(NUM_EXPERTS) for name in ("gate_proj", "up_proj")],
        [f"{experts}{number}.down_proj" for number in range(NUM_EXPERTS)],
    ]


class NoProgress:
    num_samples = 0

    def boundary(self):
        pass

    def collected(self, count):
        pass


@torch.no_grad()
@pytest.mark.parametrize("is_changed", [False, True])
def test_inputs_that_change_between_passes_are_noticed(is_changed):
    """A model that reads a layer's weight before the layer is called would otherwise be pruned wrongly, in silence."""
    setup = setup_of(build("mixtral"), 2)
    context, block, modules, found = setup.inputs_of(pruner_named("sparsegpt"), with_digests=True)
    if is_changed:
        modules["self_attn.o_proj"].weight[0, 0] += 1
    inputs = [LayerInput(one, HessianSum(one.cols, torch.device("cpu"))) for one in found]
    if is_changed:
        with pytest.raises(AssertionError, match=r"the input of mlp\.\S+ has changed between two passes"):
            collect(context, block, modules, setup.biased, inputs, {}, NoProgress())
    else:
        collect(context, block, modules, setup.biased, inputs, {}, NoProgress())
