"""From the modules of transformers that hold all experts of a block to linear layers, one for each matrix.

Most families' classes share an interface (`transformers.integrations.moe.use_experts_implementation`), which says how
their matrices are laid out. The others are described here one by one.

S: tokens.    K: experts of a token.    E: experts.    H: hidden size.    I: width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.experts import SeparateExperts


@dataclass(frozen=True)
class ExpertParameter:
    """One parameter of transformers' module: the matrices, or biases, of all experts of a block."""

    name: str  # in the module: "gate_up_proj"
    layers: tuple[str, ...]  # of an expert, which it holds: ("gate_proj", "up_proj")
    shape: tuple[int, ...]  # of one expert's part: (rows, cols), or (rows,) of a bias
    is_transposed: bool = False  # a matrix is held as (input features, output features)
    is_interleaved: bool = False  # rows of gate and up take turns; otherwise all rows of gate come first
    is_flat: bool = False  # the parts lie one below the other, (E * rows, cols); otherwise (E, rows, cols)

    @property
    def is_bias(self) -> bool:
        return len(self.shape) == 1

    @property
    def num_outputs(self) -> int:
        """Output features of one of its layers."""
        return self.shape[-1 if self.is_transposed else 0] // len(self.layers)

    @property
    def num_inputs(self) -> int:
        """Input features of each of its layers. Not for a bias."""
        return self.shape[0 if self.is_transposed else 1]


@dataclass(frozen=True)
class ExpertShape:
    """How a family of transformers holds the experts of one block."""

    path: str  # of the module in the model: "model.layers.0.mlp.experts"
    num_experts: int
    parameters: tuple[ExpertParameter, ...]


def separate_experts(model: nn.Module, towers: Sequence[str] = ()) -> tuple[ExpertShape, ...]:
    """Give every expert of a model on `meta` linear layers of its own, in place.

    towers: Modules of the model that stay as they are, with all that they hold.
    """
    others = tuple(f"{tower}." for tower in towers)
    modules = [(path, module) for path, module in model.named_modules() if not path.startswith(others)]
    shapes = []
    for path, module in modules:
        if _has_interface(module):
            shapes.append(_separate(path, module, SeparateExperts, _interface_parameters(module)))
        elif type(module).__name__ in _FAMILIES:
            separated, describe = _FAMILIES[type(module).__name__]
            shapes.append(_separate(path, module, separated, describe(module)))
        elif type(module).__name__ == "Llama4TextMoe":
            _derive(module, _Llama4Moe)
    return tuple(shapes)


def _has_interface(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _interface_parameters(module: Any) -> Iterable[ExpertParameter]:
    gated = ("gate_up_proj", ("gate_proj", "up_proj"))
    for name, layers in (gated if module.has_gate else ("up_proj", ("up_proj",)), ("down_proj", ("down_proj",))):
        is_interleaved = not module.is_concatenated and len(layers) == 2
        shape = tuple(getattr(module, name).shape[1:])
        yield ExpertParameter(name, layers, shape, module.is_transposed, is_interleaved)
        if module.has_bias:
            bias = tuple(getattr(module, f"{name}_bias").shape[1:])
            yield ExpertParameter(f"{name}_bias", layers, bias, is_interleaved=is_interleaved)


def _separate(path: str, module: Any, separated: type, parameters: Iterable[ExpertParameter]) -> ExpertShape:
    """Replace the parameters of one module by linear layers, and its forward by that of `separated`."""
    shape = ExpertShape(path, module.num_experts, tuple(parameters))
    biased = {layer for parameter in shape.parameters if parameter.is_bias for layer in parameter.layers}
    for parameter in shape.parameters:
        owner, _, name = parameter.name.rpartition(".")
        delattr(module.get_submodule(owner), name)
    for number in range(shape.num_experts):
        expert = nn.Module()
        for parameter in shape.parameters:
            for layer in () if parameter.is_bias else parameter.layers:
                sizes = (parameter.num_inputs, parameter.num_outputs)
                expert.add_module(layer, nn.Linear(*sizes, bias=layer in biased, device="meta"))
        module.add_module(str(number), expert)
    module.is_interleaved = any(parameter.is_interleaved for parameter in shape.parameters)
    _derive(module, separated)
    return shape


def _derive(module: nn.Module, separated: type) -> None:
    """Make a module an instance of `separated`, and still one of its own class."""
    family = type(module)
    module.__class__ = type(family.__name__, (separated, family), {})


class _GatedExperts(SeparateExperts):
    """Experts of a class without transformers' interface: a gate, no norm."""

    has_gate = True
    has_post_expert_norm = False


# -- Llama 4: a token's share is a factor of what its expert gets, not of what the expert returns


class _Llama4Experts(_GatedExperts):
    """In the place of `Llama4TextExperts`."""

    def forward(self, hidden: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """The sum of the outputs of each token's experts, (S, H).

        Args:
            hidden: (S, H).
            shares: Of each token for each expert, (S, E).
            chosen: Which experts a token goes to, (S, E) bool.
        """
        output = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            tokens = torch.where(chosen[:, number])[0]
            if self.sees_every_token:
                result = self._run(number, hidden * shares[:, number, None])[tokens]
            elif len(tokens):
                result = self._run(number, hidden[tokens] * shares[tokens, number, None])
            else:
                continue
            output.index_add_(0, tokens, result)
        return output

    def _apply_gate(self, inner: Tensor) -> Tensor:
        family: Any = self
        gate, up = inner.chunk(2, -1)
        gated: Tensor = up * family.act_fn(gate)
        return gated


class _Llama4Moe(nn.Module):
    """In the place of `Llama4TextMoe`: its experts get the tokens that are sent to them, not zeros for all others."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output (S, H), and the router's logits (S, E). hidden: (N, T, H)."""
        family: Any = self
        hidden = hidden.reshape(-1, family.hidden_dim)
        scores, logits = family.router(hidden)
        shares = torch.sigmoid(logits.float()).to(scores.dtype)
        # The router's scores are zero where a token does not go, and their gradient is that of the shares elsewhere.
        routed = family.experts(hidden, shares, scores > 0)
        return family.shared_expert(hidden) + routed, logits


def _llama4_parameters(module: Any) -> Iterable[ExpertParameter]:
    names = (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
    for name, layers in names:
        yield ExpertParameter(name, layers, tuple(getattr(module, name).shape[1:]), is_transposed=True)


# -- DBRX: matrices of all experts one below the other


class _DbrxExperts(_GatedExperts):
    """In the place of `DbrxExperts`."""

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As of `SeparateExperts`, but hidden and the output are (N, T, H)."""
        return super().forward(hidden.flatten(0, -2), indices, weights).view_as(hidden)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        family: Any = self
        gate, up = inner.chunk(2, -1)
        gated: Tensor = family.mlp.activation_fn(gate) * up
        return gated


def _dbrx_parameters(module: Any) -> Iterable[ExpertParameter]:
    shape = (module.ffn_hidden_size, module.hidden_size)
    yield ExpertParameter("mlp.w1", ("gate_proj",), shape, is_flat=True)
    yield ExpertParameter("mlp.v1", ("up_proj",), shape, is_flat=True)
    yield ExpertParameter("mlp.w2", ("down_proj",), shape, is_flat=True, is_transposed=True)


# Classes of transformers that hold experts in a way of their own: what takes their place, and their parameters.
_FAMILIES: Mapping[str, tuple[type, Callable[[Any], Iterable[ExpertParameter]]]] = {
    "Llama4TextExperts": (_Llama4Experts, _llama4_parameters),
    "DbrxExperts": (_DbrxExperts, _dbrx_parameters),
}
