"""Prune a whole model at once by global ADMM on the language model's own loss, after ELSA's public description.

    python -m benchmarks.quality.global_admm FOLDER --sparsity 0.7

FOLDER/model is a folder of safetensors, FOLDER/windows.npy token ids (samples, tokens), as windows.py leaves them; the
pruned copy becomes FOLDER/pruned. Prints its figures as one line of JSON, the last of its output.

ELSA (Lee et al., arXiv 2510.01650, ICLR 2026) minimises f(x) subject to x = z, z sparse, where f is the next-token loss
of the whole model:

- x: Adam on f(x) + lambda / 2 |x - z + u|^2, one batch an update;
- z, every `--interval` updates: x + u with all but the largest entries set to zero, weighted by the empirical Fisher
  information, for which Adam's second moment stands;
- u, at the same time: u + x - z.

The paper trains on 4,096 x 8 windows of 2,048 tokens with lambda 0.01, an interval of 32 and a rate of 2e-4. Here it
has about as many tokens as LAMP has in training, which is 700 times less, so rate, interval and lambda are arguments;
their defaults are the best of a small grid on examples/tiny-opt (60%, 64 x 64 tokens of pydocs, 4 epochs; there 0.01
leaves x far from z, and the last projection undoes the training: loss 2.82, with 1.0 2.57, magnitude pruning 2.60).
Every layer loses the same share of its weights; what stands outside the blocks is not trained. Written from the
description, not from the authors' code.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from benchmarks.quality.saving import save_like
from stages.machine.device import PeakMemory

_PACKAGES = ("torch", "transformers")
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Settings:
    sparsity: float
    epochs: int
    batch: int
    lr: float
    penalty: float  # lambda
    interval: int  # updates between two projections
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--penalty", type=float, default=1.0, help="lambda")
    parser.add_argument("--interval", type=int, default=16, help="updates between two projections")
    args = vars(parser.parse_args())
    folder = args.pop("folder")
    from transformers import AutoModelForCausalLM

    started, peak = time.monotonic(), PeakMemory(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    losses = prune(model, torch.from_numpy(numpy.load(folder / "windows.npy")), Settings(**args))
    save_like(folder / "model", model, folder / "pruned")
    figures = {
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak.process_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "losses": [round(loss, 4) for loss in losses],
    }
    print("\n" + json.dumps(figures), flush=True)


def prune(model: torch.nn.Module, windows: Tensor, settings: Settings) -> list[float]:
    """Prune the linear layers of the blocks of `model` in place.

    Args:
        model: A causal language model of transformers, in fp32.
        windows: Token ids, (samples, tokens).
        settings: How.

    Returns:
        The loss of each update, before it, in nats a token.
    """
    model.eval().requires_grad_(False)
    targets = {name: Split(weight, settings) for name, weight in _prunable(model)}
    assert targets, "no linear layer in a list of blocks"
    updates = list(_batches(len(windows), settings))
    losses = []
    for number, batch in enumerate(updates, 1):
        losses.append(_gradients(model, windows, batch))
        rate = settings.lr * (1 - (number - 1) / len(updates))  # linear, to zero
        for split in targets.values():
            split.step(number, rate)
        if number % settings.interval == 0:
            for split in targets.values():
                split.project()
    for split in targets.values():
        split.finish()
    return losses


class Split:
    """One weight x, (rows, cols), its sparse copy z, the scaled multiplier u, and Adam's moments of x."""

    def __init__(self, weight: torch.nn.Parameter, settings: Settings) -> None:
        self._x, self._settings = weight.requires_grad_(True), settings
        self._num_kept = weight.numel() - round(settings.sparsity * weight.numel())
        self._mean, self._square = torch.zeros_like(weight), torch.zeros_like(weight)
        self._u = torch.zeros_like(weight)
        self._z = self._sparse(weight.detach(), torch.ones_like(weight))

    @torch.no_grad()
    def step(self, number: int, rate: float) -> None:
        """Adam on the loss, whose gradient is there, and the penalty. number: of the update, from 1."""
        assert self._x.grad is not None
        gradient = self._x.grad.add_(self._x - self._z + self._u, alpha=self._settings.penalty)
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        size = (self._square / (1 - _BETAS[1] ** number)).sqrt_().add_(_EPS)
        self._x.addcdiv_(self._mean, size, value=-rate / (1 - _BETAS[0] ** number))
        self._x.grad = None

    @torch.no_grad()
    def project(self) -> None:
        """The sparse copy nearest to x + u, and the multiplier's step."""
        self._z = self._sparse(self._x + self._u, self._square)
        self._u += self._x - self._z

    @torch.no_grad()
    def finish(self) -> None:
        """The weight itself becomes sparse."""
        self._x.copy_(self._sparse(self._x.detach(), self._square))

    def _sparse(self, values: Tensor, information: Tensor) -> Tensor:
        score = (values.square() * information).flatten()
        kept = score.topk(self._num_kept).indices
        found = torch.zeros_like(score)
        found[kept] = values.flatten()[kept]
        return found.view_as(values)


def _prunable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, blocks in model.named_modules():
        if isinstance(blocks, torch.nn.ModuleList):
            for name, module in blocks.named_modules():
                if isinstance(module, torch.nn.Linear):
                    yield f"{path}.{name}", module.weight


def _batches(num_samples: int, settings: Settings) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        yield from torch.randperm(num_samples, generator=order).split(settings.batch)


def _gradients(model: torch.nn.Module, windows: Tensor, batch: Tensor) -> float:
    """Leave the gradient of the mean next-token loss of these samples in the weights; gives the loss."""
    total = 0.0
    for index in batch.tolist():
        ids = windows[index][None].long()
        loss = model(ids, labels=ids, use_cache=False).loss / len(batch)
        loss.backward()
        total += loss.item()
    return total


if __name__ == "__main__":
    main()
