"""Statistics of experts: the tokens that the router sends them; completed by all experts' where they are too few."""

import pytest
import torch

from stages.errors import UsageError
from stages.in_memory import ListStream
from stages.interfaces import Checkpoint
from stages.models.base import LayerInfo
from stages.models.experts import every_token_to_every_expert
from stages.models.in_memory import open_in_memory
from stages.pruners.statistics import HessianSum, SquareSum
from stages.runtime.expert_statistics import ExpertTokens
from stages.runtime.layer_inputs import DistinctInput, collect, find_inputs
from stages.runtime.statistics_passes import StatisticsPasses
from tests.blocks import context_of
from tests.small_experts import NUM_EXPERTS, TOP_K, build
from tests.small_models import VOCAB

CPU = torch.device("cpu")
N, T = 6, 16
IDS = torch.randint(4, VOCAB, (N, T), generator=torch.Generator().manual_seed(3))


class Progress:
    """Of a pass that nothing stops."""

    num_samples = 0

    def boundary(self):
        pass

    def collected(self, count):
        self.num_samples += count


def collected(model, kind=HessianSum, block_index=0, *, to_all=False):
    """The statistics of each layer of a block on its dense inputs, and the tokens of the experts' layers.

    to_all: every expert gets all tokens.
    """
    decoder = open_in_memory(model)
    inputs = ListStream(N, (T,), torch.long)
    hidden = ListStream(N, (T, decoder.hidden_size), torch.float32)
    entries = decoder.load_ends(CPU, "enter").enter(IDS)
    before = entries.hidden
    for index in range(block_index):
        before = decoder.run_block(decoder.load_block(index, CPU), before, entries.calls[index])
    for i in range(N):
        inputs.write(i, IDS[i])
        hidden.write(i, before[i])
    context = context_of(decoder, inputs).block(block_index)
    block, infos = context.load(), decoder.layers(block_index)
    modules = {info.path: block.get_submodule(info.path) for info in infos}
    with every_token_to_every_expert(block, is_on=to_all):
        found = find_inputs(context, block, modules, hidden, with_digests=False)
        passes = StatisticsPasses(found, kind, CPU, None)
        assert passes.begin()
        progress = Progress()
        collect(context, block, modules, hidden, passes.current, passes.to_count, progress)
    assert progress.num_samples == N
    return by_path(passes), passes.tokens


def by_path(passes):
    return {path: found for found in passes.current for path in found.source.paths}


def tokens_of_experts(model, block_index=0):
    """What each expert of transformers' own model gets: inputs of its first matrices, and of its last."""
    experts = model.model.layers[block_index].mlp.experts
    seen = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    ((hidden, indices, _),) = seen
    first = [hidden[(indices == number).any(dim=1)] for number in range(NUM_EXPERTS)]
    last = [experts._apply_gate(x @ weight.T).detach() for x, weight in zip(first, experts.gate_up_proj, strict=True)]
    return first, last


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_hessians_are_those_of_the_tokens_that_the_router_sends(family):
    model = build(family)
    if family == "deepseek-v3":
        model.config.first_k_dense_replace = 0
        model = type(model)(model.config).eval()
    first, last = tokens_of_experts(model)
    assert sum(map(len, first)) == N * T * TOP_K
    assert min(map(len, first)) > 0
    found, received = collected(model)
    for number, (x, y) in enumerate(zip(first, last, strict=True)):
        path = f"mlp.experts.{number}"
        assert found[f"{path}.gate_proj"] is found[f"{path}.up_proj"]
        for layer, tokens in (("gate_proj", x), ("down_proj", y)):
            assert received[f"{path}.{layer}"] == len(tokens)
            own = 2 / len(tokens) * tokens.double().T @ tokens.double()
            torch.testing.assert_close(found[f"{path}.{layer}"].statistics.matrix().double(), own, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2-moe", "deepseek-v2", "deepseek-v3", "glm4-moe"])
@pytest.mark.parametrize("to_all", [False, True])
def test_a_shared_expert_has_the_statistics_of_all_tokens(family, to_all):
    """The router does not choose it. Where all experts get all tokens, it may read the same tensor as they."""
    model = build(family)
    mlp = model.model.layers[1].mlp
    shared = "shared_expert" if hasattr(mlp, "shared_expert") else "shared_experts"
    seen = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    model(IDS, use_cache=False)
    handle.remove()
    expected = 2 / (N * T) * seen[0].T @ seen[0]
    found, received = collected(model, block_index=1, to_all=to_all)
    with_all = [f"mlp.{shared}.gate_proj", f"mlp.{shared}.up_proj"]
    if to_all:
        with_all += [f"mlp.experts.{number}.gate_proj" for number in range(NUM_EXPERTS)]
        assert {received[f"mlp.experts.{number}.down_proj"] for number in range(NUM_EXPERTS)} == {N * T}
    for path in with_all:
        torch.testing.assert_close(found[path].statistics.matrix().double(), expected, rtol=1e-3, atol=1e-5)


def infos_of(num_experts, cols):
    return [
        LayerInfo(f"m.experts.{n}.{name}", f"experts.{n}.{name}", None, 3, cols, False, f"experts.*.{name}", 0.5)
        for n in range(num_experts)
        for name in ("gate_proj", "up_proj")
    ]


def passes_of(kind, tokens, cols, room_bytes=None):
    """The passes of a block whose experts get these tokens, for each expert those of its gate and up projections."""
    inputs = [
        DistinctInput(
            tuple(f"experts.{n}.{name}" for name in ("gate_proj", "up_proj")),
            cols,
            tuple(f"experts.*.{name}" for name in ("gate_proj", "up_proj")),
        )
        for n in range(len(tokens))
    ]
    return StatisticsPasses(inputs, kind, CPU, room_bytes)


def add(passes, tokens):
    """Collect what one pass has to collect."""
    for found in passes.current:
        number = int(found.source.paths[0].split(".")[1])
        if len(tokens[number]):
            found.statistics.add(tokens[number])
    for source in passes.to_count:
        passes.received[source] += len(tokens[int(source.paths[0].split(".")[1])])


def completed(kind, tokens, cols):
    """The statistics after one pass, by path, and what the experts received."""
    passes = passes_of(kind, tokens, cols)
    assert passes.begin()
    add(passes, tokens)
    passes.complete()
    return by_path(passes), ExpertTokens.of(infos_of(len(tokens), cols), passes.tokens, kind)


def examples(counts, cols):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(count, cols, generator=generator) for count in counts]


def test_few_tokens_are_completed_by_the_mean_of_all_experts():
    cols, counts = 8, (20, 3, 0, 8)
    tokens = examples(counts, cols)
    found, told = completed(HessianSum, tokens, cols)
    assert (told.num_experts, told.num_short, told.fewest, told.expert) == (4, 2, 0, "experts.2")
    everything = torch.cat(tokens).double()
    mean = 2 * everything.T @ everything / len(everything)
    for number, x in enumerate(tokens):
        x = x.double()
        own = 2 * x.T @ x / max(len(x), 1)
        share = min(len(x) / cols, 1.0)
        wanted = share * own + (1 - share) * mean
        both = [found[f"experts.{number}.{name}"] for name in ("gate_proj", "up_proj")]
        assert both[0] is both[1]
        torch.testing.assert_close(both[0].statistics.matrix().double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.linalg.matrix_rank(both[0].statistics.matrix().double()) == cols


def test_mean_squares_are_completed_likewise():
    cols = 4
    tokens = examples((10, 1), cols)
    found, _ = completed(SquareSum, tokens, cols)
    everything = torch.cat(tokens)
    wanted = 0.25 * tokens[1][0].square() + 0.75 * everything.square().mean(dim=0)
    torch.testing.assert_close(found["experts.1.up_proj"].statistics.mean_square(), wanted)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_an_expert_with_few_tokens_waits_for_the_statistics_of_all(is_resumed):
    """Experts 1 and 2 have too few; each pass has room for the statistics of one expert and the sum of all."""
    cols, counts = 8, (20, 3, 0, 9)
    tokens = examples(counts, cols)
    one_pass, wanted = completed(HessianSum, tokens, cols)
    passes = passes_of(HessianSum, tokens, cols, room_bytes=2 * 4 * cols**2)
    assert passes.num_planned == 3  # the first pass keeps room for a sum; if all have enough, none is needed
    order = []
    while passes.begin():
        if not passes.is_complete:
            order.append(passes.current[0].source.paths[0])
            assert len(passes.current) == 1
            add(passes, tokens)
            passes.complete()
            assert passes.num_planned == 6
        for path, found in by_path(passes).items():
            assert torch.equal(found.statistics.matrix(), one_pass[path].statistics.matrix())
        if is_resumed:
            saved, passes = passes.checkpoint(), passes_of(HessianSum, tokens, cols, room_bytes=2 * 4 * cols**2)
            passes.restore(Checkpoint({name: x.clone() for name, x in saved.tensors.items()}, saved.figures))
        if passes.current:
            passes.finish_first()
    assert order == [f"experts.{number}.gate_proj" for number in (0, 1, 2, 3, 1, 2)]
    assert passes.num_passes == 6
    assert ExpertTokens.of(infos_of(4, cols), passes.tokens, HessianSum) == wanted


def test_experts_with_enough_tokens_need_no_sum_and_share_passes():
    cols, counts = 8, (20, 9, 30, 8)
    tokens = examples(counts, cols)
    passes = passes_of(HessianSum, tokens, cols, room_bytes=2 * 4 * cols**2)
    sizes = []
    while passes.begin():
        add(passes, tokens)
        passes.complete()
        assert passes.num_planned == 3
        assert not [name for name in passes.checkpoint().tensors if name.startswith("total")]
        sizes.append(len(passes.current))
        while passes.current:
            passes.finish_first()
    assert sizes == [1, 2, 1]


def test_a_resumed_pass_keeps_what_fits_and_leaves_the_rest_to_later_passes():
    cols, counts = 8, (20, 30, 40, 50)
    tokens = examples(counts, cols)
    passes = passes_of(HessianSum, tokens, cols)
    passes.begin()
    add(passes, tokens)
    saved = passes.checkpoint()
    again = passes_of(HessianSum, tokens, cols, room_bytes=3 * 4 * cols**2)
    again.restore(Checkpoint({name: tensor.clone() for name, tensor in saved.tensors.items()}, saved.figures))
    assert again.begin()
    assert [found.source.paths[0] for found in again.current] == ["experts.0.gate_proj", "experts.1.gate_proj"]
    assert again.num_planned == 2
    for path, found in by_path(again).items():
        assert torch.equal(found.statistics.matrix(), by_path(passes)[path].statistics.matrix())


def test_statistics_are_completed_once_whatever_is_resumed():
    cols, counts = 8, (20, 3, 0)
    tokens = examples(counts, cols)
    passes = passes_of(HessianSum, tokens, cols)
    passes.begin()
    add(passes, tokens)
    passes.complete()
    saved = passes.checkpoint()
    again = passes_of(HessianSum, tokens, cols)
    again.restore(Checkpoint({name: tensor.clone() for name, tensor in saved.tensors.items()}, saved.figures))
    assert again.begin()
    assert again.is_complete
    assert again.received == passes.received
    for path, found in by_path(passes).items():
        assert torch.equal(by_path(again)[path].statistics.matrix(), found.statistics.matrix())


class _Maxima:
    """A stranger's statistics, which experts cannot share."""

    def __init__(self, cols, device):
        self.sums = torch.zeros(cols, device=device)

    def add(self, x):
        self.sums = torch.maximum(self.sums, x.abs().amax(dim=0))

    def relative_error(self, before, after):
        return None

    def state(self):
        return self.sums, {}

    @classmethod
    def restored(cls, sums, counts, device):
        raise NotImplementedError

    @staticmethod
    def num_numbers(cols):
        return cols


def test_statistics_that_cannot_be_shared_need_a_token_for_every_expert():
    cols = 4
    tokens = examples((10, 1), cols)
    few, told = completed(_Maxima, tokens, cols)
    assert told.num_short == 1
    assert str(told).endswith("used as they are")
    assert torch.equal(few["experts.1.up_proj"].statistics.sums, tokens[1][0].abs())
    with pytest.raises(UsageError, match=r"experts\.1\.gate_proj.*_Maxima cannot be shared"):
        completed(_Maxima, examples((10, 0), cols), cols)


def test_a_block_without_experts_has_nothing_to_complete():
    info = LayerInfo("m.q", "q", "q", 3, 4, False)
    assert ExpertTokens.of([info], {"q": 1}, HessianSum) is None
