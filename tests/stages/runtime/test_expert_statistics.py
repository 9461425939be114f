"""Statistics of experts: the tokens that the router sends them; completed by all experts' where they are too few."""

import pytest
import torch

from stages.errors import UsageError
from stages.in_memory import ListStream, NullCallbacks
from stages.interfaces import Checkpoint
from stages.models.base import LayerInfo
from stages.models.in_memory import open_in_memory
from stages.pruners.statistics import HessianSum, SquareSum
from stages.runtime.block_runner import Counter
from stages.runtime.expert_statistics import complete
from stages.runtime.layer_inputs import LayerInput, LayerInputs, collect
from tests.blocks import context_of
from tests.small_experts import NUM_EXPERTS, TOP_K, build
from tests.small_models import VOCAB

CPU = torch.device("cpu")
N, T = 6, 16
IDS = torch.randint(4, VOCAB, (N, T), generator=torch.Generator().manual_seed(3))


def collected(model, kind=HessianSum, block_index=0):
    """The statistics of a block on its dense inputs, and its prunable layers."""
    decoder = open_in_memory(model)
    inputs = ListStream(N, (T,), torch.long)
    hidden = ListStream(N, (T, decoder.hidden_size), torch.float32)
    entries = decoder.load_ends(CPU, "enter").enter(IDS)
    for i in range(N):
        inputs.write(i, IDS[i])
        hidden.write(i, entries.hidden[i])
    context = context_of(decoder, inputs).block(block_index)
    block, infos = context.load(), decoder.layers(block_index)
    modules = {info.path: block.get_submodule(info.path) for info in infos}
    counter = Counter(NullCallbacks(), N, "samples")
    return collect(context, block, modules, hidden, kind, counter), infos


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
    found, _ = collected(model)
    by_path = found.by_path
    for number, (x, y) in enumerate(zip(first, last, strict=True)):
        path = f"mlp.experts.{number}"
        assert by_path[f"{path}.gate_proj"] is by_path[f"{path}.up_proj"]
        for layer, tokens in (("gate_proj", x), ("down_proj", y)):
            assert by_path[f"{path}.{layer}"].num_tokens == len(tokens)
            own = 2 / len(tokens) * tokens.double().T @ tokens.double()
            torch.testing.assert_close(
                by_path[f"{path}.{layer}"].statistics.matrix().double(), own, rtol=1e-4, atol=1e-6
            )


def infos_of(num_experts, cols):
    return [
        LayerInfo(f"m.experts.{n}.{name}", f"experts.{n}.{name}", None, 3, cols, False, f"experts.*.{name}", 0.5)
        for n in range(num_experts)
        for name in ("gate_proj", "up_proj")
    ]


def gathered(kind, tokens, cols):
    """Statistics as `collect` leaves them: an expert without tokens has none."""
    found = LayerInputs(num_samples=1)
    for number, x in enumerate(tokens):
        if len(x):
            entry = LayerInput(kind(cols, CPU), [f"experts.{number}.gate_proj", f"experts.{number}.up_proj"], len(x))
            entry.statistics.add(x)
            found.inputs.append(entry)
    return found


def examples(counts, cols):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(count, cols, generator=generator) for count in counts]


def test_few_tokens_are_completed_by_the_mean_of_all_experts():
    cols, counts = 8, (20, 3, 0, 8)
    tokens = examples(counts, cols)
    found = gathered(HessianSum, tokens, cols)
    told = complete(found, infos_of(4, cols), HessianSum, CPU)
    assert (told.num_experts, told.num_short, told.fewest, told.expert) == (4, 2, 0, "experts.2")
    everything = torch.cat(tokens).double()
    mean = 2 * everything.T @ everything / len(everything)
    for number, x in enumerate(tokens):
        x = x.double()
        own = 2 * x.T @ x / max(len(x), 1)
        share = min(len(x) / cols, 1.0)
        wanted = share * own + (1 - share) * mean
        both = [found.by_path[f"experts.{number}.{name}"] for name in ("gate_proj", "up_proj")]
        assert both[0] is both[1]
        torch.testing.assert_close(both[0].statistics.matrix().double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.linalg.matrix_rank(both[0].statistics.matrix().double()) == cols
        assert both[0].num_tokens == counts[number]  # what it received, for the report


def test_mean_squares_are_completed_likewise():
    cols = 4
    tokens = examples((10, 1), cols)
    found = gathered(SquareSum, tokens, cols)
    complete(found, infos_of(2, cols), SquareSum, CPU)
    everything = torch.cat(tokens)
    wanted = 0.25 * tokens[1][0].square() + 0.75 * everything.square().mean(dim=0)
    torch.testing.assert_close(found.by_path["experts.1.up_proj"].statistics.mean_square(), wanted)


def test_statistics_are_completed_once_whatever_is_resumed():
    cols, counts = 8, (20, 3, 0)
    found = gathered(HessianSum, examples(counts, cols), cols)
    first = complete(found, infos_of(3, cols), HessianSum, CPU)
    saved = found.checkpoint()
    again = LayerInputs.restored(
        Checkpoint({name: tensor.clone() for name, tensor in saved.tensors.items()}, saved.figures), HessianSum, CPU
    )
    assert complete(again, infos_of(3, cols), HessianSum, CPU) == first
    for path, entry in found.by_path.items():
        assert torch.equal(again.by_path[path].statistics.matrix(), entry.statistics.matrix())


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
    few = gathered(_Maxima, examples((10, 1), cols), cols)
    before = few.by_path["experts.1.up_proj"].statistics.sums.clone()
    told = complete(few, infos_of(2, cols), _Maxima, CPU)
    assert told.num_short == 1
    assert str(told).endswith("used as they are")
    assert torch.equal(few.by_path["experts.1.up_proj"].statistics.sums, before)
    with pytest.raises(UsageError, match=r"experts\.1\.gate_proj.*_Maxima cannot be shared"):
        complete(gathered(_Maxima, examples((10, 0), cols), cols), infos_of(2, cols), _Maxima, CPU)


def test_a_block_without_experts_has_nothing_to_complete():
    info = LayerInfo("m.q", "q", "q", 3, 4, False)
    assert complete(LayerInputs(), [info], HessianSum, CPU) is None
