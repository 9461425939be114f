"""Mixtures of experts: the experts of a block as ordinary linear layers, one for each matrix.

transformers holds the matrices of all experts of a block in a few 3-D parameters. `separate_experts` gives each expert
linear layers of its own: `experts.3.gate_proj`, `experts.3.up_proj`, `experts.3.down_proj`. Everything that deals with
layers (hooks, budgets, masks, N:M patterns, quantization grids, training) then sees 2-D weights, and a token reaches
the layers of those experts only to which the router sends it.

S: tokens.    K: experts of a token.    E: experts.    H: hidden size.    I: width of an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROUTERS = frozenset({"gate", "wg", "router", "shared_expert_gate", "shared_experts_gate"})


@dataclass(frozen=True)
class ExpertShape:
    """How a family of transformers holds the experts of one block."""

    path: str  # of the module in the model: "model.layers.0.mlp.experts"
    num_experts: int
    hidden: int  # H
    width: int  # I
    is_gated: bool  # each expert has a gate beside its up projection
    is_transposed: bool  # a matrix is held as (input features, output features)
    is_interleaved: bool  # rows of gate and up take turns; otherwise all rows of gate come first
    has_bias: bool


def separate_experts(model: nn.Module, towers: Sequence[str] = ()) -> tuple[ExpertShape, ...]:
    """Give every expert of a model on `meta` linear layers of its own, in place.

    Only modules with transformers' interface of experts are changed: their class says how its matrices are laid out,
    whatever the family (`transformers.integrations.moe.use_experts_implementation`).

    towers: Modules of the model that stay as they are, with all that they hold.
    """
    others = tuple(f"{tower}." for tower in towers)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if _has_interface(module) and not path.startswith(others)
    ]
    return tuple(_separate(path, module) for path, module in found)


def peers_of(path: str, experts: str) -> str:
    """The layers at the same place in all experts, as one name: "mlp.experts.*.up_proj".

    Args:
        path: Of an expert's layer in the block: "mlp.experts.3.up_proj".
        experts: Of the module that holds the experts: "mlp.experts".
    """
    return f"{experts}.*.{path.removeprefix(experts).split('.', 2)[2]}"


def token_share(config: Any, num_experts: int) -> float:
    """The share of the tokens that an expert gets on average; 1 if the configuration does not say."""
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "num_experts_per_token")
    chosen = next((value for name in names if isinstance(value := getattr(config, name, None), int)), num_experts)
    return min(chosen / num_experts, 1.0)


def is_router(path: str) -> bool:
    """Whether the layer at `path` of a block with experts decides which expert, or how much of one, a token gets."""
    return path.rpartition(".")[2] in _ROUTERS or path.endswith("router.layer")


def experts_in(block: nn.Module) -> dict[str, int]:
    """The modules of a block that hold experts, and how many: of `separate_experts`, or a family's own list."""
    return {
        path: sum(name.isdigit() for name, _ in module.named_children())
        for path, module in block.named_modules()
        if isinstance(module, SeparateExperts)
        or (isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts")
    }


@contextlib.contextmanager
def every_token_to_every_expert(block: nn.Module, *, is_on: bool) -> Iterator[None]:
    """Context in which all experts see all tokens, so that statistics are collected on them; the output is the same."""
    modules = [module for module in block.modules() if isinstance(module, SeparateExperts)] if is_on else []
    for module in modules:
        module.sees_every_token = True
    try:
        yield
    finally:
        for module in modules:
            module.sees_every_token = False


class SeparateExperts(nn.Module):
    """The experts of a block; the class of the family comes after this one and says how a gate is applied.

    Computes what the family's own "eager" implementation computes, token by token and expert after expert in the order
    of their numbers, so that the result depends on nothing but the inputs. It may differ by rounding, because gate
    and up are two products.
    """

    num_experts: int
    has_gate: bool
    is_interleaved: bool
    # Statistics may be collected on all tokens; the output is the same: an expert's other outputs are dropped.
    sees_every_token = False

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The sum of the outputs of each token's experts, (S, H).

        Args:
            hidden: (S, H).
            indices: The experts of each token, (S, K).
            weights: Their shares of the sum, (S, K).
        """
        output = torch.zeros_like(hidden)
        numbers = range(self.num_experts) if self.sees_every_token else torch.unique(indices).tolist()
        for number in numbers:
            slots, tokens = torch.where(torch.eq(indices.T, number))
            every = self.sees_every_token
            result = self._run(number, hidden)[tokens] if every else self._run(number, hidden[tokens])
            output.index_add_(0, tokens, (result * weights[tokens, slots, None]).to(output.dtype))
        return output

    def _run(self, number: int, x: Tensor) -> Tensor:
        """The output of one expert, (tokens, H)."""
        family: Any = self  # the attributes of the class that follows
        expert: Any = self.get_submodule(str(number))
        if self.has_gate:
            both = (expert.gate_proj(x), expert.up_proj(x))
            inner = torch.stack(both, -1).flatten(-2) if self.is_interleaved else torch.cat(both, -1)
            inner = family._apply_gate(inner)
        else:
            inner = family.act_fn(expert.up_proj(x))
        result: Tensor = expert.down_proj(inner)
        return family.post_expert_norm(result) if family.has_post_expert_norm else result


def _has_interface(module: nn.Module) -> bool:
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _separate(path: str, module: Any) -> ExpertShape:
    """Replace the 3-D parameters of one module by linear layers."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    num_experts = first.shape[0]
    rows, hidden = first.shape[:0:-1] if module.is_transposed else first.shape[1:]
    shape = ExpertShape(
        path=path,
        num_experts=num_experts,
        hidden=hidden,
        width=rows // 2 if module.has_gate else rows,
        is_gated=module.has_gate,
        is_transposed=module.is_transposed,
        is_interleaved=not module.is_concatenated,
        has_bias=module.has_bias,
    )
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        for parameter in (name, f"{name}_bias"):
            if hasattr(module, parameter):
                delattr(module, parameter)
    for number in range(num_experts):
        expert = nn.Module()
        if shape.is_gated:
            expert.gate_proj = nn.Linear(hidden, shape.width, bias=shape.has_bias, device="meta")
        expert.up_proj = nn.Linear(hidden, shape.width, bias=shape.has_bias, device="meta")
        expert.down_proj = nn.Linear(shape.width, hidden, bias=shape.has_bias, device="meta")
        module.add_module(str(number), expert)
    module.num_experts, module.is_interleaved = num_experts, shape.is_interleaved
    family = type(module)
    module.__class__ = type(family.__name__, (SeparateExperts, family), {})
    return shape
