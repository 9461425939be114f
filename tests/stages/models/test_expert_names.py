"""Places of experts' matrices, against what transformers' own conversions make of the stored tensors."""

import pytest
import torch
from transformers.core_model_loading import Interleave, Transpose, WeightConverter, WeightRenaming

from stages.models.expert_names import place_experts
from stages.models.expert_separation import ExpertParameter, ExpertShape

E, H, WIDTH = 4, 6, 10
PATH = "model.layers.0.mlp.experts"


def shape(is_gated=True):
    inner = ("gate_up_proj", ("gate_proj", "up_proj")) if is_gated else ("up_proj", ("up_proj",))
    parameters = (
        ExpertParameter(*inner, (WIDTH * len(inner[1]), H)),
        ExpertParameter("down_proj", ("down_proj",), (H, WIDTH)),
    )
    return ExpertShape(PATH, E, parameters)


def placed(stored, expert_shape, transforms):
    return place_experts(stored, [expert_shape], transforms, "model", lambda key: tuple(stored[key].shape))


@pytest.mark.parametrize(
    ("operations", "stored_shape"),
    [
        ([Transpose(1, 2)], (E, H, 2 * WIDTH)),
        ([Transpose(1, 2, check_dims=True)], (E, H, 2 * WIDTH)),
        ([Interleave(dim=1)], (E, 2 * WIDTH, H)),
    ],
)
def test_a_stored_tensor_of_all_experts_is_cut_as_transformers_converts_it(operations, stored_shape):
    stored = {f"{PATH}.w13": torch.randn(stored_shape), f"{PATH}.down_proj": torch.randn(E, H, WIDTH)}
    converter = WeightConverter("mlp.experts.w13", "mlp.experts.gate_up_proj", operations=operations)
    parts = placed(stored, shape(), [converter])
    whole = stored[f"{PATH}.w13"]
    if isinstance(operations[0], Transpose):
        whole = whole.transpose(1, 2)
    else:
        patterns = {"source_patterns": ["w13"], "target_patterns": ["gate_up_proj"]}
        whole = operations[0].convert({"w13": whole}, **patterns)["gate_up_proj"]
    for number in range(E):
        gate, up = whole[number].chunk(2)
        for name, wanted in (("gate_proj", gate), ("up_proj", up), ("down_proj", stored[f"{PATH}.down_proj"][number])):
            part = parts[f"{PATH}.{number}.{name}.weight"]
            assert torch.equal(part.of(stored[part.key]), wanted), name


def test_a_tensor_that_has_the_shape_of_the_module_is_not_transposed():
    stored = {f"{PATH}.gate_up_proj": torch.randn(E, 2 * WIDTH, H)}
    converter = WeightConverter(
        "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", operations=[Transpose(1, 2, check_dims=True)]
    )
    part = placed(stored, shape(), [converter])[f"{PATH}.2.up_proj.weight"]
    assert torch.equal(part.of(stored[part.key]), stored[part.key][2, WIDTH:])


def test_experts_without_a_gate_and_other_prefixes_are_found():
    stored = {
        "layers.0.mlp.experts.up_proj": torch.randn(E, WIDTH, H),
        f"old.{PATH}.down_proj": torch.randn(E, H, WIDTH),
    }
    parts = placed(stored, shape(is_gated=False), [WeightRenaming(r"^old\.", "")])
    assert set(parts) == {f"{PATH}.{n}.{name}.weight" for n in range(E) for name in ("up_proj", "down_proj")}
    part = parts[f"{PATH}.1.up_proj.weight"]
    assert torch.equal(part.of(stored[part.key]), stored["layers.0.mlp.experts.up_proj"][1])


def test_a_tensor_of_another_number_of_experts_has_no_place():
    stored = {f"{PATH}.down_proj": torch.randn(E + 1, H, WIDTH)}
    assert placed(stored, shape(), []) == {}


def test_an_unknown_conversion_gives_no_place():
    class Unknown(Transpose):
        pass

    stored = {f"{PATH}.gate_up_proj": torch.randn(E, 2 * WIDTH, H)}
    converter = WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", operations=[Unknown(1, 2)])
    assert placed(stored, shape(), [converter]) == {}
