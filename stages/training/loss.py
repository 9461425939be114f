"""What training makes smaller, and on which samples it is judged.

T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

# One sample in 16 is held out: its loss shows whether training generalises.
_HELD_OUT_EVERY = 16
# Lower bound for the target's mean square. Prevents division by a near-zero scale.
_SMALLEST_SCALE = 1e-12


def split_samples(num_samples: int, holds_out: bool) -> tuple[list[int], list[int]]:
    """Indices of the samples to train on and of the held-out ones: 1 in 16, one of fewer than 16, none of one."""
    if not holds_out or num_samples < 2:
        return list(range(num_samples)), []
    num_held_out = max(1, num_samples // _HELD_OUT_EVERY)
    held_out = [(2 * k + 1) * num_samples // (2 * num_held_out) for k in range(num_held_out)]
    return [i for i in range(num_samples) if i not in set(held_out)], held_out


def block_loss(hidden: Tensor, target: Tensor, kind: str) -> Tensor:
    """The loss of a block's output against its target, both (1, T, H): a scalar, in fp32.

    "mse": mean squared error over all elements (LAMP Eq. 9 up to a factor). "token": the same, each token's
    error divided by the mean square of its target, so that a token of enormous activations counts as one token.
    """
    hidden, target = hidden.float(), target.float()
    if kind == "mse":
        return nn.functional.mse_loss(hidden, target)
    if kind == "token":
        scale = target.square().mean(dim=-1).clamp_min(_SMALLEST_SCALE)
        return ((hidden - target).square().mean(dim=-1) / scale).mean()
    raise ValueError(f"unknown loss {kind}")
