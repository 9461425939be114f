"""Train one block by Adam until, on the biased stream, it gives what a target stream holds.

Compensation (LAMP Eq. 9) trains a dense block, refinement a pruned one; how they train is the same and is here.

T: tokens of a sample.    H: hidden size.    One sample a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.capture import batch_of_one
from stages.device import DeviceChoices, computing
from stages.errors import NumericalError
from stages.models.base import BlockCall, BlockModel, Ends
from stages.protocols import Hooks, Stream
from stages.randomness import generator_for

# One sample in so many is kept aside to see whether what is learnt holds beyond the samples trained on.
_ASIDE_EVERY = 16
# A target this small (mean square) is nobody's scale: it would blow up a relative loss.
_SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class TrainingSettings:
    """How to train."""

    epochs: int
    lr: float
    lr_decay: float  # the rate is multiplied by this after each epoch
    hold_aside: bool  # judge on samples kept aside and never keep what made it worse; off: as the paper, train on all
    seed: int
    loss: str = "mse"  # as the paper; or "token": each token's error relative to its target


@dataclass(frozen=True)
class Losses:
    """Mean loss over the samples trained on and over those kept aside (None: none were)."""

    trained: float
    aside: float | None

    @property
    def judged(self) -> float:
        """The loss that decides: of the samples kept aside, where there are any."""
        return self.trained if self.aside is None else self.aside


@dataclass(frozen=True)
class Training:
    """How a block's training went."""

    before: Losses
    after: Losses
    epoch_losses: tuple[Losses, ...]  # `trained` is the mean over the epoch's own steps
    num_steps: int
    kept_epoch: int  # the epoch whose weights were kept, from 1; 0: those from before, nothing helped


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


class BlockTrainer:
    """Trains a block that is given, in place.

    block: fp32, on the device of `choices`. inputs: token ids of the N samples. stream_in, targets: N samples
    (T, H), what the block gets and what it should give; `targets` may still be filled before `train` is called.
    purpose: names the random order of the samples, and what is trained in messages. passes_before: passes over
    all samples that the caller makes itself, for the progress shown.
    """

    def __init__(
        self,
        model: BlockModel,
        block: nn.Module,
        block_index: int,
        inputs: Stream,
        stream_in: Stream,
        targets: Stream,
        settings: TrainingSettings,
        choices: DeviceChoices,
        hooks: Hooks,
        *,
        purpose: str,
        passes_before: int = 0,
        passes_after: int = 0,
    ) -> None:
        self.model, self.block, self.block_index = model, block, block_index
        self.inputs, self.stream_in, self.targets = inputs, stream_in, targets
        self.settings, self.choices, self.hooks, self.purpose = settings, choices, hooks, purpose
        self.device = choices.torch_device
        self.ends: Ends = model.load_ends(self.device, part="enter")
        self.train_set, self.aside = split_samples(len(inputs), settings.hold_aside)
        if settings.hold_aside and not self.aside and settings.epochs:
            hooks.warn("only one calibration sample: none is kept aside, training is judged on itself")
        num_steps = settings.epochs * len(self.train_set)
        self._total = (passes_before + passes_after) * len(inputs) + num_steps
        self._done = 0

    def call(self, index: int) -> BlockCall:
        """The block's arguments beside the hidden state, for one sample."""
        with torch.no_grad(), computing(self.choices):
            return self.ends.enter(batch_of_one(self.inputs[index], self.device)).calls[self.block_index]

    def forward(self, stream: Stream, index: int, call: BlockCall) -> Tensor:
        """The block's output (1, T, H) for one sample of a stream."""
        with computing(self.choices):
            return self.model.run_block(self.block, batch_of_one(stream[index], self.device), call)

    def loss(self, index: int, call: BlockCall) -> Tensor:
        """The loss of one sample."""
        hidden = self.forward(self.stream_in, index, call)
        return block_loss(hidden, batch_of_one(self.targets[index], self.device), self.settings.loss)

    def advance(self, **figures: float) -> None:
        """Tell that one more sample has passed."""
        self._done += 1
        self.hooks.report(self._done, self._total, "samples", **figures)

    @torch.no_grad()
    def losses(self, before_each: Callable[[int, BlockCall], None] | None = None) -> Losses:
        """The mean loss over all samples as the block is now. before_each: done first, sample by sample."""
        values: dict[int, float] = {}
        for index in range(len(self.inputs)):
            self.hooks.check_stop()
            call = self.call(index)
            if before_each is not None:
                before_each(index, call)
            values[index] = self.loss(index, call).item()
            self.advance()
        return Losses(_mean(values, self.train_set), _mean(values, self.aside) if self.aside else None)

    def train(self, before: Losses, parameters: Sequence[nn.Parameter]) -> Training:
        """Train `parameters` of the block, which gave the losses `before`; leaves the weights that were best.

        Raises NumericalError if the loss is or becomes no finite number.
        """
        if not math.isfinite(before.trained):
            raise NumericalError(
                f"block {self.block_index}: the loss is {before.trained} before any training: the model's weights or "
                "activations hold NaN or infinity"
            )
        if not self.settings.epochs:
            return Training(before, before, (), 0, 0)
        original = copy.deepcopy(self.block.state_dict()) if self.settings.hold_aside else None
        best, best_state, kept_epoch = before.judged, original, 0
        epochs: list[Losses] = []
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=self.settings.lr, fused=True)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.choices.torch_dtype == torch.float16)
        for epoch in range(1, self.settings.epochs + 1):
            trained = self._train_epoch(epoch, optimizer, scaler)
            aside = self._mean_loss(self.aside) if self.aside else None
            epochs.append(Losses(trained, aside))
            if not self.settings.hold_aside:
                kept_epoch = epoch
                continue
            # `trained` is from before each of the epoch's own updates: it cannot judge them.
            judged = aside if aside is not None else self._mean_loss(self.train_set)
            if judged < best:
                best, best_state, kept_epoch = judged, copy.deepcopy(self.block.state_dict()), epoch
            else:
                break  # no longer falling
        optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        if best_state is not None:
            self.block.load_state_dict(best_state)
        after = before
        if kept_epoch:
            after = Losses(self._mean_loss(self.train_set), self._mean_loss(self.aside) if self.aside else None)
        if not math.isfinite(after.trained):  # the last update came after the last loss
            raise NumericalError(
                f"block {self.block_index}: the loss is {after.trained} after training; {self._advice()}"
            )
        self.hooks.report(self._total, self._total, "samples", loss=after.judged)
        return Training(before, after, tuple(epochs), len(epochs) * len(self.train_set), kept_epoch)

    def _train_epoch(self, epoch: int, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler) -> float:
        """One pass over the samples trained on, in an order of its own; gives the mean loss of its steps."""
        generator = generator_for(self.settings.seed, self.purpose, self.block_index, epoch)
        order = [self.train_set[i] for i in torch.randperm(len(self.train_set), generator=generator).tolist()]
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * self.settings.lr_decay ** (epoch - 1)
        losses: dict[int, float] = {}
        for index in order:
            self.hooks.check_stop()
            loss = self.loss(index, self.call(index))
            losses[index] = loss.item()
            if not math.isfinite(losses[index]):
                raise NumericalError(
                    f"block {self.block_index}: the loss became {losses[index]} in epoch {epoch}; {self._advice()}"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            self.advance(loss=losses[index], epoch=epoch)
        return _mean(losses, order)

    def _advice(self) -> str:
        flag = "--refine-lr" if self.purpose == "refine" else "--lr"
        return f"use a smaller {flag} than {self.settings.lr:g}"

    @torch.no_grad()
    def _mean_loss(self, indices: Sequence[int]) -> float:
        values: dict[int, float] = {}
        for index in indices:
            self.hooks.check_stop()
            values[index] = self.loss(index, self.call(index)).item()
        return _mean(values, indices)


def _mean(losses: dict[int, float], indices: Sequence[int]) -> float:
    return math.fsum(losses[i] for i in indices) / len(indices)
