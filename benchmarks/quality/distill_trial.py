"""Try settings of distillation on a finished run: its pruned blocks are trained in memory, and measured.

    python -m benchmarks.quality.distill_trial runs/s70 --lr 1e-3 1.5e-3 --batch 16 --samples 128

One line for each combination is appended to --out: held-out loss before and after, perplexity, processor seconds. The
run gives the pruned model, the calibration source and its protocol; it is not changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.rundir.run_directory import RunDirectory
from pipeline.steps import payloads
from pipeline.steps.context import StepContext
from pipeline.steps.run_facts import config_of
from pipeline.steps.stage_settings import drawing_of
from stages import export
from stages.data.registry import parse_source
from stages.distill import Distiller, DistillSettings
from stages.evaluate import evaluate
from stages.formats.pruning_masks import read_mask_file
from stages.in_memory import ListScratch, ListStream, NullCallbacks
from stages.machine.device import apply
from stages.metrics.base import EvaluationProtocol, MetricContext
from stages.replay import replay
from stages.runtime.block_context import StageContext
from stages.training.student import PrunedBlocks


def main() -> None:
    args = _arguments()
    context = _Pruned(args)
    if args.untrained:
        _report(args, context, {}, {}, 0.0)
    for lr, batch, epochs in itertools.product(args.lr, args.batch, args.epochs):
        settings = DistillSettings(epochs, lr, batch, True, args.seed)
        started = time.process_time()
        report, states = context.distilled(settings)
        seconds = time.process_time() - started
        found = {"before": report.before, "after": report.after, "kept_epoch": report.kept_epoch}
        found["updates"] = len(report.updates)
        if args.losses:
            found["losses"] = [round(loss, 4) for loss in report.updates]
        _report(args, context, states, {"lr": lr, "batch": batch, "epochs": epochs, **found}, seconds)


class _Pruned:
    """The pruned model of a run, its samples and its teacher."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.run = RunDirectory.open(args.run)
        self.context = StepContext(self.run, config_of(self.run))
        self.model, self.choices = self.context.model, replace(self.context.choices, num_threads=args.threads)
        if args.dtype:
            self.choices = replace(self.choices, dtype=args.dtype)
        apply(self.choices)
        config = self.context.config
        num_samples = args.samples or config.num_samples
        drawing = replace(drawing_of(config), num_samples=num_samples, bos=_bos_of(self.run))
        assert config.calibration is not None
        source = parse_source(config.calibration)
        drawn = self.context.task.draw(self.model, source, drawing, NullCallbacks())
        self.inputs = drawn.samples
        shape = self.model.hidden_shape(tuple(self.inputs[0].shape))
        self.teacher = ListStream(num_samples, shape, self.choices.torch_dtype)
        stage = StageContext(self.model, self.inputs, self.choices, NullCallbacks())
        replay(stage, self.teacher, self.model.num_blocks, lambda index: None, ListScratch())
        self.protocol = EvaluationProtocol(config.seqlen, args.eval_max_tokens, bos=drawing.bos)

    def state_of(self, block: int) -> dict[str, torch.Tensor]:
        path = self.run.open_file(payloads.pruned(block).name)
        return dict(export.block_state(self.model, block, path))

    def distilled(self, settings: DistillSettings):  # type: ignore[no-untyped-def]
        masks = {
            block: export.outcome_of(
                read_mask_file(self.run.open_file(payloads.masks(block).name)), self.context.config.n_of_m
            )
            for block in range(self.model.num_blocks)
        }
        callbacks = NullCallbacks()
        stage = StageContext(self.model, self.inputs, self.choices, callbacks)
        pruned = PrunedBlocks(self.state_of, masks.__getitem__)
        distiller = Distiller(stage, pruned, self.teacher, settings, ListScratch(), callbacks, is_resident=True)
        report = distiller.train()
        dtype = self.context.config.export_dtype
        states = {
            block: distiller.finish(block, export.block_dtypes(self.model, block, dtype)).state
            for block in range(self.model.num_blocks)
        }
        return report, states

    def perplexity(self, states: dict[int, dict[str, torch.Tensor]], source: str) -> float:
        model, load = self.model, type(self.model).load_block
        exact = replace(self.choices, dtype="float32")
        model.load_block = lambda i, *rest, **more: load(  # type: ignore[method-assign]
            model, i, *rest, **{"state": states.get(i) or self.state_of(i), **more}
        )
        try:
            text = parse_source(source)
            context = MetricContext(model, model, text, self.protocol, ListScratch(), exact, NullCallbacks())
            return evaluate(context).value
        finally:
            del model.load_block


def _bos_of(run: RunDirectory) -> str:
    for commit in run.commits:
        if commit.step == "calibrate" and commit.result.get("bos"):
            return str(commit.result["bos"]["mode"])
    return "stream"


def _report(args: argparse.Namespace, pruned: _Pruned, states, found, seconds: float) -> None:  # type: ignore[no-untyped-def]
    line = {"run": str(args.run), "samples": len(pruned.inputs), **found, "cpu_s": round(seconds)}
    line["perplexity"] = {name: round(pruned.perplexity(states, name), 2) for name in args.evaluate}
    print(json.dumps(line), flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps({"command": " ".join(sys.argv[1:]), **line}) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--evaluate", nargs="*", default=["pydocs"])
    parser.add_argument("--eval-max-tokens", type=int, default=10240)
    parser.add_argument("--lr", type=float, nargs="+", default=[1.5e-3])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype")
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--untrained", action="store_true", help="measure the run's own model first")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
