"""Try training settings quickly, in memory: LAMP on the first blocks of a model, the others left as they are, or whole.

    python -m benchmarks.quality.trial --blocks 12 --sparsity 0.7 --epochs 2 --refine-epochs 3 --loss token --lr 2e-3
    python -m benchmarks.quality.trial --whole --sparsity 0.7 --pruner alps --epochs 0 --refine-epochs 1

The first blocks cost a fraction of a run and rank settings that act on every block alike (losses, rates, pruners);
settings of the budget need all blocks. --whole prunes all and distils them, with a run's defaults of distillation; the
blocks are trained as the flags say.
Calibration and evaluation are C4 where ../shared/data has it, else pydocs: never the text that results are reported
on. Appends one line to --out; docs/experiments.md holds what came of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.quality.texts import EMBEDDED, SHARED, as_text_file, say_embedded
from pipeline.config.checks import SEARCHED
from stages.calibrate import calibrate
from stages.data.drawing import Drawing
from stages.data.registry import parse_source
from stages.data.text_source import Bos
from stages.distill import DistillSettings
from stages.distill_in_memory import distill_in_memory
from stages.evaluate import evaluate
from stages.in_memory import ListScratch, ListStream, NullCallbacks
from stages.lamp import LampBlock, LampSettings, lamp
from stages.machine.device import apply, choose
from stages.metrics.base import EvaluationProtocol, MetricContext
from stages.models.base import BlockModel
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.pruners.base import PruneOptions
from stages.pruners.registry import PRUNERS
from stages.runtime.block_context import StageContext
from stages.sparsity.budget import BlockBudget, LayerShape, allocate, follow_pattern
from stages.sparsity.nm_pattern import Pattern
from stages.training.presets import DEFAULT_EFFORT, distillation
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings


def main() -> None:
    args = _arguments()
    model = open_model(resolve(args.model, None))
    choices = dataclasses.replace(choose("cpu", args.dtype), num_threads=args.threads)
    apply(choices)
    calibration = _text(args.calibration, SHARED / "c4_demo.jsonl", "calibration", args.work)
    evaluation = _text(args.evaluate, SHARED / "c4_prompts.pf-decoding.jsonl", "evaluation", args.work)
    drawing = Drawing(args.num_samples, args.seqlen, None, bos=args.bos)
    tokens = calibrate(parse_source(calibration), model.source, drawing, NullCallbacks())
    inputs = ListStream(len(tokens), (args.seqlen,), tokens.dtype)
    for index, sample in enumerate(tokens):
        inputs.write(index, sample)
    started = time.monotonic()
    context = StageContext(model, inputs, choices, NullCallbacks())
    blocks = prune_first_blocks(context, args)
    line: dict[str, Any] = {"command": " ".join(sys.argv[1:])}
    if args.whole:
        num_generated = args.num_samples if args.distill_generated is None else args.distill_generated
        epochs, batch = distillation(DEFAULT_EFFORT, args.num_samples + num_generated)
        rate = None if args.distill_lr == SEARCHED else Rate.parse(args.distill_lr)
        settings = DistillSettings(args.distill_epochs or epochs, rate, args.distill_batch or batch, True, args.seed)
        distilled = distill_in_memory(context, blocks, settings, num_generated)
        blocks, report = distilled.blocks, distilled.distillation
        line |= {"kl": report.before, "distilled kl": report.after, "distill lr": str(report.lr)}
    states = {block.index: block.finished.state for block in blocks}
    seconds = time.monotonic() - started
    load = model.load_block
    model.load_block = lambda i, *rest, **more: load(i, *rest, **more, state=states.get(i))  # type: ignore[method-assign]
    exact = dataclasses.replace(choices, dtype="float32")
    protocol = EvaluationProtocol(args.seqlen, args.eval_max_tokens, bos=args.eval_bos or args.bos)
    source = parse_source(evaluation)
    found = evaluate(MetricContext(model, model, source, protocol, ListScratch(), exact, NullCallbacks()))
    line |= {"perplexity": round(found.value, 2), "seconds": round(seconds)}
    print(json.dumps(line))
    with args.out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _text(named: Path | None, usual: Path, purpose: str, work: Path) -> str:
    """lampctl's name of a text: the file that was named, else the usual one, else the embedded corpus, said loudly."""
    path = named or usual
    if named is None and not usual.exists():
        say_embedded(purpose, usual)
        return EMBEDDED
    return f"text:{as_text_file(path, work)}"


def prune_first_blocks(context: StageContext, args: argparse.Namespace) -> Sequence[LampBlock]:
    """LAMP on the blocks that are to be pruned."""
    pattern = Pattern.parse(args.pattern) if args.pattern else None
    options = PruneOptions(pattern=pattern, bits=args.bits)
    shared = (args.lr_decay, args.held_out, args.seed, args.loss)
    refinement = TrainingSettings(args.refine_epochs, Rate.parse(args.refine_lr or args.lr), *shared)
    settings = LampSettings(
        PRUNERS.get(args.pruner)(options),
        TrainingSettings(args.epochs, Rate.parse(args.lr), *shared),
        refinement if args.refine_epochs else None,
    )
    budget = _budgets(context.model, pattern, args)[: None if args.whole else args.blocks]
    return list(lamp(context, budget, settings))


def _budgets(model: BlockModel, pattern: Pattern | None, args: argparse.Namespace) -> tuple[BlockBudget, ...]:
    shapes = [[LayerShape(x.name, x.role, x.rows, x.cols) for x in model.layers(i)] for i in range(model.num_blocks)]
    return follow_pattern(shapes, pattern) if pattern else allocate(shapes, args.sparsity, args.alpha, args.beta)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", type=Path, help="text or JSON lines; default: C4 in ../shared/data, or pydocs")
    parser.add_argument("--evaluate", type=Path, help="other text or JSON lines; default: likewise")
    parser.add_argument("--blocks", type=int, default=12, help="how many to prune, from the first on")
    parser.add_argument("--whole", action="store_true", help="prune all blocks, and distil them")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--pattern", help="N:M in place of --sparsity")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--alpha", type=float, default=0.7)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--pruner", default="sparsegpt")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", default="1%")
    parser.add_argument("--lr-decay", type=float, default=0.87)
    parser.add_argument("--loss", default="token")
    parser.add_argument("--held-out", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--refine-epochs", type=int, default=3)
    parser.add_argument("--refine-lr")
    parser.add_argument("--distill-epochs", type=int, help="default: by the number of samples")
    parser.add_argument("--distill-batch", type=int, help="default: by the number of samples")
    parser.add_argument("--distill-lr", default=SEARCHED)
    parser.add_argument("--distill-generated", type=int, help="default: as many as --num-samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--bos", choices=get_args(Bos), default="stream", help="where BOS stands in samples")
    parser.add_argument("--eval-bos", choices=get_args(Bos), help="in what is evaluated; default: as in samples")
    parser.add_argument("--eval-max-tokens", type=int, default=10240)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/trial"))
    parser.add_argument("--out", type=Path, default=Path("runs/trials.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
