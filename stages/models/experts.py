"""Mixtures of experts: the experts of a block as ordinary linear layers, one for each matrix.

transformers holds the matrices of all experts of a block in a few parameters. `stages.models.expert_separation` gives
each expert linear layers of its own: `experts.3.gate_proj`, `experts.3.up_proj`, `experts.3.down_proj`. Everything that
deals with layers (hooks, budgets, masks, N:M patterns, quantization grids, training) then sees 2-D weights, and a token
reaches the layers of those experts only to which the router sends it.

S: tokens.    K: experts of a token.    E: experts.    H: hidden size.    I: width of an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROUTERS = frozenset({"gate", "wg", "router", "shared_expert_gate", "shared_experts_gate"})


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
    places = (config, getattr(config, "ffn_config", None))  # DBRX has one of its own for experts
    values = (getattr(place, name, None) for place in places for name in names)
    chosen = next((value for value in values if isinstance(value, int)), num_experts)
    return min(chosen / num_experts, 1.0)


def is_router(path: str) -> bool:
    """Whether the layer at `path` of a block with experts decides which expert, or how much of one, a token gets."""
    return path.rpartition(".")[2] in _ROUTERS or path.endswith("router.layer")


def experts_in(block: nn.Module) -> dict[str, int]:
    """The modules of a block that hold experts, and how many: separated ones, or a family's own list."""
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


@contextlib.contextmanager
def only_experts(block: nn.Module, wanted: Collection[str] | None) -> Iterator[None]:
    """Context in which the other experts compute nothing: their outputs are zero, and so the block's is wrong.

    For a pass that needs the inputs of some experts' layers alone.

    Args:
        block: The block.
        wanted: The experts, by their paths in the block: "mlp.experts.3". None: all.
    """
    modules = {path: module for path, module in block.named_modules() if isinstance(module, SeparateExperts)}
    if wanted is not None:
        for path, module in modules.items():
            module.computed = {number for number in range(module.num_experts) if f"{path}.{number}" in wanted}
    try:
        yield
    finally:
        for module in modules.values():
            module.computed = None


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
    computed: Collection[int] | None = None  # the other experts return zeros; None: all are computed

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
        if self.computed is not None and number not in self.computed:
            return torch.zeros_like(x)
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
