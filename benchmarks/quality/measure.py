"""Look at a model folder, whoever made it: zeros in the linear layers of its blocks, and perplexity.

    python -m benchmarks.quality.measure MODEL [--evaluate SRC,...] [--pattern N:M]

Prints JSON. Every model of the benchmark is measured by this, whoever pruned it, with the code and on the windows that
`lampctl evaluate` uses.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from stages.data.registry import parse_source
from stages.evaluate import evaluate
from stages.in_memory import ListScratch, NullCallbacks
from stages.machine.device import PeakMemory, apply, choose
from stages.metrics.base import EvaluationProtocol, MetricContext
from stages.models.base import BlockModel
from stages.models.decoder import open_model
from stages.models.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--evaluate", default="", metavar="SRC,...")
    parser.add_argument("--eval-seqlen", type=int, default=256)
    parser.add_argument("--eval-max-tokens", type=int, default=10240)
    parser.add_argument("--pattern", metavar="N:M", help="also: the share of groups of M with at least N zeros")
    args = parser.parse_args()
    choices = choose()
    apply(choices)
    peak = PeakMemory(choices.torch_device)
    started = time.monotonic()
    model = open_model(resolve(args.model))
    report = count(model, args.pattern)
    report["evaluations"] = []
    for name in filter(None, args.evaluate.split(",")):
        source = parse_source(name)
        protocol = EvaluationProtocol(args.eval_seqlen, args.eval_max_tokens)
        found = evaluate(MetricContext(model, model, source, protocol, ListScratch(), choices, NullCallbacks()))
        measured = {"source": source.name, "perplexity": found.value, "num_tokens": found.details.amount}
        report["evaluations"].append(measured)
    report["elapsed_s"] = time.monotonic() - started
    report["peak_memory_bytes"] = peak.device_bytes() or peak.process_bytes()
    print(json.dumps(report))


def count(model: BlockModel, pattern: str | None = None) -> dict:
    """Share of zeros among the weights that can be pruned, and of groups that hold the pattern (None: no pattern)."""
    num_zeros = num_weights = num_held = num_groups = 0
    for index in range(model.num_blocks):
        block = model.load_block(index, torch.device("cpu"))
        for layer in model.layers(index):
            weight = model.weight_matrix(block.get_submodule(layer.path))
            num_zeros += int((weight == 0).sum())
            num_weights += weight.numel()
            if pattern is not None:
                held = holds(weight, pattern)
                num_held += int(held.sum())
                num_groups += held.numel()
    return {
        "sparsity": num_zeros / num_weights,
        "num_weights": num_weights,
        "pattern_held": None if pattern is None else num_held / num_groups,
    }


def holds(weight: Tensor, pattern: str) -> Tensor:
    """For each group of M columns of `weight` (rows, cols), whether at least N of them are zero: (rows, cols / M)."""
    zeros_of, group_size = map(int, pattern.split(":"))
    return (weight == 0).unflatten(1, (-1, group_size)).sum(dim=2) >= zeros_of


if __name__ == "__main__":
    main()
