"""Lines 6-8 of the paper's Algorithm 1: let the next, still dense block learn away what pruning cost.

dense_out = B_original(dense_in)                      line 7
B <- argmin |B(biased_in) - dense_out|^2              line 8, LAMP Eq. 9, by Adam over all of B's parameters
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.capture import batch_of_one
from stages.device import DeviceChoices, computing
from stages.errors import NumericalError
from stages.models.base import BlockModel, Ends
from stages.protocols import Hooks, Stream
from stages.randomness import generator_for

# One sample in so many is kept aside to see whether what is learnt holds beyond the samples trained on.
_ASIDE_EVERY = 16


@dataclass(frozen=True)
class CompensationSettings:
    """How to train."""

    epochs: int
    lr: float
    lr_decay: float  # the rate is multiplied by this after each epoch
    hold_aside: bool  # stop early and never keep an update that made it worse; off: as the paper, train on all
    seed: int


@dataclass(frozen=True)
class Losses:
    """Mean squared error per element, over the samples trained on and over those kept aside (None: none were)."""

    trained: float
    aside: float | None

    @property
    def judged(self) -> float:
        """The loss that decides: of the samples kept aside, where there are any."""
        return self.trained if self.aside is None else self.aside


@dataclass(frozen=True)
class CompensatedBlock:
    """A block's fp32 state after training, and how it got there."""

    state: dict[str, Tensor]
    before: Losses
    after: Losses
    epoch_losses: tuple[Losses, ...]  # `trained` is the mean over the epoch's own steps
    num_steps: int
    kept_epoch: int  # the epoch whose weights were kept, from 1; 0: the original weights, nothing helped


def compensate_block(
    model: BlockModel,
    block_index: int,
    inputs: Stream,
    biased_in: Stream,
    dense_in: Stream,
    dense_out: Stream,
    settings: CompensationSettings,
    choices: DeviceChoices,
    hooks: Hooks,
) -> CompensatedBlock:
    """Train block `block_index` to give, on the biased stream, what the original gives on the dense one.

    inputs: token ids of the N samples. biased_in, dense_in, dense_out: N samples (tokens, hidden); `dense_out`
    is written first, by the original block, and then is the target.
    Raises NumericalError if the loss stops being finite.
    """
    return _Trainer(model, block_index, inputs, biased_in, dense_in, dense_out, settings, choices, hooks).run()


def split_samples(num_samples: int, hold_aside: bool) -> tuple[list[int], list[int]]:
    """Samples to train on and samples kept aside: every 16th, one of fewer than 16, none of a single one."""
    if not hold_aside or num_samples < 2:
        return list(range(num_samples)), []
    num_aside = max(1, num_samples // _ASIDE_EVERY)
    aside = [(2 * k + 1) * num_samples // (2 * num_aside) for k in range(num_aside)]
    return [i for i in range(num_samples) if i not in set(aside)], aside


class _Trainer:
    def __init__(
        self,
        model: BlockModel,
        block_index: int,
        inputs: Stream,
        biased_in: Stream,
        dense_in: Stream,
        dense_out: Stream,
        settings: CompensationSettings,
        choices: DeviceChoices,
        hooks: Hooks,
    ) -> None:
        self.model, self.block_index = model, block_index
        self.inputs, self.biased_in, self.dense_in, self.dense_out = inputs, biased_in, dense_in, dense_out
        self.settings, self.choices, self.hooks = settings, choices, hooks
        self.device = choices.torch_device
        self.ends: Ends = model.load_ends(self.device, part="enter")
        self.block = model.load_block(block_index, self.device)
        self.train_set, self.aside = split_samples(len(inputs), settings.hold_aside)
        if settings.hold_aside and not self.aside:
            hooks.warn("only one calibration sample: none is kept aside, training is judged on itself")
        # Passes: original over all, epochs over the trained ones, the result over all.
        self._total = 2 * len(inputs) + settings.epochs * len(self.train_set)
        self._done = 0

    def run(self) -> CompensatedBlock:
        """All of it, in the order of the algorithm."""
        before = self._open()
        if not math.isfinite(before.trained):
            raise NumericalError(
                f"block {self.block_index}: the loss is {before.trained} before any training: the model's weights or "
                "activations hold NaN or infinity"
            )
        best, best_state, kept_epoch = before.judged, None, 0
        epochs: list[Losses] = []
        self.block.requires_grad_(True)
        optimizer = torch.optim.Adam(self.block.parameters(), lr=self.settings.lr, fused=True)
        uses_scaler = self.choices.torch_dtype == torch.float16
        scaler = torch.amp.GradScaler(self.device.type, enabled=uses_scaler)
        for epoch in range(1, self.settings.epochs + 1):
            trained = self._train_epoch(epoch, optimizer, scaler)
            aside = self._mean_loss(self.aside) if self.aside else None
            epochs.append(Losses(trained, aside))
            if not self.settings.hold_aside:
                continue
            # `trained` is from before each of the epoch's own updates: it cannot judge them.
            judged = aside if aside is not None else self._mean_loss(self.train_set)
            if judged < best:
                best, best_state, kept_epoch = judged, copy.deepcopy(self.block.state_dict()), epoch
            else:
                break  # no longer falling
        optimizer.zero_grad(set_to_none=True)
        self.block.requires_grad_(False)
        if self.settings.hold_aside:
            if best_state is None:  # nothing helped: the original weights
                self.block = self.model.load_block(self.block_index, self.device)
            else:
                self.block.load_state_dict(best_state)
        else:
            kept_epoch = self.settings.epochs
        after = (
            before
            if kept_epoch == 0
            else Losses(self._mean_loss(self.train_set), self._mean_loss(self.aside) if self.aside else None)
        )
        self.hooks.report(self._total, self._total, "samples", loss=after.judged)
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.block.state_dict().items()}
        steps = len(epochs) * len(self.train_set)
        return CompensatedBlock(state, before, after, tuple(epochs), steps, kept_epoch)

    @torch.no_grad()
    def _open(self) -> Losses:
        """The original block on both streams: the targets, and the loss before training."""
        losses: dict[int, float] = {}
        for index in range(len(self.inputs)):
            self.hooks.check_stop()
            call = self._call(index)
            with computing(self.choices):
                dense = self.model.run_block(self.block, batch_of_one(self.dense_in[index], self.device), call)
            self.dense_out.write(index, dense[0])
            losses[index] = self._loss(index, call).item()
            self._advance()
        return Losses(_mean(losses, self.train_set), _mean(losses, self.aside) if self.aside else None)

    def _train_epoch(self, epoch: int, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler) -> float:
        """One pass over the samples trained on, in an order of its own; gives the mean loss of its steps."""
        generator = generator_for(self.settings.seed, "compensate", self.block_index, epoch)
        order = [self.train_set[i] for i in torch.randperm(len(self.train_set), generator=generator).tolist()]
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * self.settings.lr_decay ** (epoch - 1)
        losses: dict[int, float] = {}
        for index in order:
            self.hooks.check_stop()
            loss = self._loss(index, self._call(index))
            losses[index] = loss.item()
            if not math.isfinite(losses[index]):
                raise NumericalError(
                    f"block {self.block_index}: the loss became {losses[index]} in epoch {epoch}; "
                    f"use a smaller --lr than {self.settings.lr:g}"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            self._advance(loss=losses[index], epoch=epoch)
        return _mean(losses, order)

    @torch.no_grad()
    def _mean_loss(self, indices: Sequence[int]) -> float:
        losses: dict[int, float] = {}
        for index in indices:
            self.hooks.check_stop()
            losses[index] = self._loss(index, self._call(index)).item()
        return _mean(losses, indices)

    def _call(self, index: int):  # type: ignore[no-untyped-def]
        with torch.no_grad(), computing(self.choices):
            return self.ends.enter(batch_of_one(self.inputs[index], self.device)).calls[self.block_index]

    def _loss(self, index: int, call) -> Tensor:  # type: ignore[no-untyped-def]
        """Mean squared error over all elements, in fp32."""
        target = batch_of_one(self.dense_out[index], self.device).float()
        with computing(self.choices):
            hidden = self.model.run_block(self.block, batch_of_one(self.biased_in[index], self.device), call)
        return nn.functional.mse_loss(hidden.float(), target)

    def _advance(self, **figures: float) -> None:
        self._done += 1
        self.hooks.report(self._done, self._total, "samples", **figures)


def _mean(losses: dict[int, float], indices: Sequence[int]) -> float:
    return math.fsum(losses[i] for i in indices) / len(indices)
