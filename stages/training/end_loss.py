"""Loss of a whole model's output against the output of the dense model.

T: tokens of a sample.    H: hidden size.    V: vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from stages.runtime.logit_slices import token_slices

# `lampctl status` shows the titles and must not wait a second for torch.
if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.base import Ends

# Lower bound for the target's mean square. Prevents division by zero.
_SMALLEST_SCALE = 1e-12


class LossAndGradient(NamedTuple):
    """The loss of one sample, and its gradient with respect to the last block's output."""

    value: float
    gradient: Tensor | None  # (1, T, H) in fp32; None: not asked for


class EndLoss(Protocol):
    """A loss of the model's output, given the last block's output of the pruned and of the dense model."""

    name: ClassVar[str]
    title: ClassVar[str]  # for people: "KL divergence to the dense model"

    @staticmethod
    def of(
        ends: Ends,
        inputs: Tensor,
        hidden: Tensor,
        target: Tensor,
        vocab_size: int,
        *,
        needs_gradient: bool,
        dense_ends: Ends | None = None,
    ) -> LossAndGradient:
        """The loss of one sample.

        Args:
            ends: The model's final norm and head.
            inputs: The model's input, such as token ids (1, T).
            hidden: The last block's output in the pruned model, (1, T, H).
            target: The last block's output in the dense model, (1, T, H).
            vocab_size: V.
            needs_gradient: Compute the gradient with respect to `hidden`, too.
            dense_ends: The dense model's final norm and head; None: they are `ends`.
        """
        ...


class Divergence:
    """KL divergence of the next-token distribution from that of the dense model, the mean over all tokens, in nats.

    Tokens are taken in slices, so that logits (T, V) are never whole in memory.
    """

    name: ClassVar[str] = "kl"
    title: ClassVar[str] = "KL divergence to the dense model"

    @staticmethod
    def of(
        ends: Ends,
        inputs: Tensor,
        hidden: Tensor,
        target: Tensor,
        vocab_size: int,
        *,
        needs_gradient: bool,
        dense_ends: Ends | None = None,
    ) -> LossAndGradient:
        import torch

        dense_ends = dense_ends or ends
        tokens = inputs.shape[1]
        value, gradient = 0.0, torch.empty_like(hidden, dtype=torch.float32) if needs_gradient else None
        for part in token_slices(tokens, vocab_size):
            with torch.no_grad():
                expected = dense_ends.leave(inputs[:, part], target[:, part].float()).float().log_softmax(-1)
            with torch.set_grad_enabled(needs_gradient):
                student = hidden[:, part].detach().float().requires_grad_(needs_gradient)
                found = ends.leave(inputs[:, part], student).float().log_softmax(-1)
                loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / tokens
            value += loss.item()
            if gradient is not None:
                (gradient[:, part],) = torch.autograd.grad(loss, student)
        return LossAndGradient(value, gradient)


class RelativeError:
    """Mean squared error of the output, divided by the mean square of the dense model's."""

    name: ClassVar[str] = "relative-error"
    title: ClassVar[str] = "relative error of the output to the dense model's"

    @staticmethod
    def of(
        ends: Ends,
        inputs: Tensor,
        hidden: Tensor,
        target: Tensor,
        vocab_size: int,
        *,
        needs_gradient: bool,
        dense_ends: Ends | None = None,
    ) -> LossAndGradient:
        import torch

        dense_ends = dense_ends or ends
        with torch.no_grad():
            expected = dense_ends.leave(inputs, target.float()).float()
        with torch.set_grad_enabled(needs_gradient):
            student = hidden.detach().float().requires_grad_(needs_gradient)
            found = ends.leave(inputs, student).float()
            loss = (found - expected).square().mean() / expected.square().mean().clamp_min(_SMALLEST_SCALE)
        gradient = torch.autograd.grad(loss, student)[0] if needs_gradient else None
        return LossAndGradient(loss.item(), gradient)


END_LOSSES: dict[str, type[EndLoss]] = {loss.name: loss for loss in (Divergence, RelativeError)}


def title_of(name: str) -> str:
    """The title of an end loss, for people; of one of another package its name."""
    return END_LOSSES[name].title if name in END_LOSSES else name
