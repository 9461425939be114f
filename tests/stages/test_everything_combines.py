"""Method x goal x bits x family: the exported weights have exactly the requested sparsity, pattern and bits."""

import pytest
import torch

from stages.in_memory import ListStream
from stages.lamp import LampSettings, lamp
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.sparsity.nm_pattern import Pattern
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import budget_of, context_of, pruner_named
from tests.small_models import VOCAB, save

pytestmark = pytest.mark.long
N, T = 3, 16
FAMILIES = ("llama-gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gpt2")))
# (sparsity, alpha, beta) or a pattern.
GOALS = ((0.5, 1.0, 0.0), (0.6, 0.8, 0.2), (0.9, 0.95, 0.0), Pattern(2, 4), Pattern(4, 8), Pattern(1, 16))
QUANTIZATION = ((None, None), (4, None), (3, 8))
METHODS = ("magnitude", "wanda", "sparsegpt", "alps", "lamp", "lamp, refined")
CASES = [
    (method, goal, bits)
    for method in METHODS
    for goal in GOALS
    for bits in QUANTIZATION
    if not (method == "wanda" and bits[0])  # refused: tests/pipeline/config/test_run_config.py
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("models") / "m", request.param, num_blocks=2)
    return open_model(resolve(str(folder)))


def pruned_blocks(model, method, goal, bits):
    """Each block with its budget, by Algorithm 1 in memory, exported in bf16."""
    inputs = ListStream(N, (T,), torch.long)
    for i in range(N):
        inputs.write(i, torch.randint(4, VOCAB, (T,), generator=torch.Generator().manual_seed(i)))
    pattern = goal if isinstance(goal, Pattern) else None
    trains, refines = method.startswith("lamp"), method.endswith("refined")
    name = "alps" if refines else "sparsegpt" if trains else method
    pruner = pruner_named(name, pattern=pattern, bits=bits[0], group_size=bits[1])
    training = TrainingSettings(1, Rate(1e-3), 0.9, True, 0)
    settings = LampSettings(pruner, training if trains else None, training if refines else None, "bfloat16")
    budget = budget_of(model, *((goal,) if pattern else goal))
    yield from zip(budget, lamp(context_of(model, inputs), budget, settings), strict=True)


@pytest.mark.parametrize(("method", "goal", "bits"), CASES, ids=str)
def test_counts_patterns_and_levels_are_exact(model, method, goal, bits):
    total = masked = 0
    for i, (budget, block) in enumerate(pruned_blocks(model, method, goal, bits)):
        outcome, finished = block.outcome, block.finished
        by_name = {layer.name: layer for layer in budget.layers}
        for info in model.layers(i):
            stored = finished.state[f"{info.path}.weight"]
            assert stored.dtype == torch.bfloat16
            weight = stored.T if info.transposed else stored
            mask = outcome.layers[info.name].mask
            assert mask.sum() == by_name[info.name].num_masked
            assert torch.all(weight[mask] == 0)
            assert torch.isfinite(weight).all()
            total, masked = total + weight.numel(), masked + int(mask.sum())
            if isinstance(goal, Pattern):
                zeros = (weight == 0).reshape(info.rows, -1, goal.group).sum(2)
                assert (zeros >= goal.num_zero).all()
                assert (mask.reshape(info.rows, -1, goal.group).sum(2) == goal.num_zero).all()
            if bits[0]:
                for row in weight.float():
                    assert all(len(part.unique()) <= 2 ** bits[0] for part in row.split(bits[1] or len(row)))
            else:  # nothing was put on a grid by mistake
                assert len(weight[~mask].unique()) > min(200, (~mask).sum() // 4)
    sparsity = goal.sparsity if isinstance(goal, Pattern) else goal[0]
    assert masked == round(sparsity * total)
