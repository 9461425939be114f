"""What training makes smaller, and on which samples it is judged.

T: tokens of a sample.    H: hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

# One sample in so many is kept aside to see whether what is learnt holds beyond the samples trained on.
_ASIDE_EVERY = 16
# A target this small (mean square) is nobody's scale: it would blow up a relative loss.
_SMALLEST_SCALE = 1e-12


def split_samples(num_samples: int, hold_aside: bool) -> tuple[list[int], list[int]]:
    """Samples to train on and samples kept aside: every 16th, one of fewer than 16, none of a single one."""
    if not hold_aside or num_samples < 2:
        return list(range(num_samples)), []
    num_aside = max(1, num_samples // _ASIDE_EVERY)
    aside = [(2 * k + 1) * num_samples // (2 * num_aside) for k in range(num_aside)]
    return [i for i in range(num_samples) if i not in set(aside)], aside


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
