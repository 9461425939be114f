"""The paper's Table 6 on this machine: memory and time of pruning OPT-6.7B. See gpu.md.

    python -m benchmarks.performance.gpu [--methods 'SparseGPT; LAMP'] [--shape opt-1.3b]

A model of that shape with random weights stands in for it: memory and time do not depend on the values, and nothing is
downloaded. One row a method goes to benchmarks/results/gpu.csv as soon as it is done, and is kept: a second call
continues, and a run that was stopped is resumed. gpu.md beside it has the table. --device cpu --blocks 2
--num-samples 2 tries it anywhere.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.performance.models import SHAPES, opt_like
from benchmarks.performance.runs import LAMPCTL, call, steps_of
from benchmarks.reporting import RESULTS, code_version, machine, markdown_table, read_rows, write_page, write_rows

METHODS = {
    "SparseGPT": ("--method", "sparsegpt"),
    "Wanda": ("--method", "wanda"),
    # Settings as published; one epoch, as the public code closest to the paper has it for models of this size.
    "LAMP as published": ("--method", "lamp", "--preset", "paper", "--epochs", "1"),
    "ALPS": ("--method", "alps"),
    "LAMP, effort low": ("--method", "lamp", "--effort", "low"),
    "LAMP": ("--method", "lamp"),
}
PUBLISHED_GB = {("opt-6.7b", name): gb for name, gb in (("SparseGPT", 8.3), ("Wanda", 21), ("LAMP as published", 7.8))}
# What the steps of a run are called in the table, in their order there. Steps of other kinds count as "other".
KINDS = ("prune-block", "compensate-block", "refine-block", "generate", "teach", "distill")
_KEY = ("device", "shape", "blocks", "num_samples", "seqlen", "method")
_COLUMNS = (
    *_KEY,
    *("peak_gpu_bytes", "peak_card_bytes", "peak_process_bytes", "seconds"),
    *(f"seconds_{kind}" for kind in (*KINDS, "other")),
    *("machine", "torch", "code"),
)


class CardMemory:
    """Context that watches how much of the card is taken, as nvidia-smi shows it: by all processes together."""

    def __init__(self, device: str, interval_s: float = 0.1) -> None:
        self._device, self._interval_s = torch.device(device), interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes: int | None = None  # above what was taken before; None: there is no card

    def __enter__(self) -> CardMemory:
        if self._device.type == "cuda":
            self._before = self._taken()
            self.peak_bytes = 0
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _taken(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval_s):
            assert self.peak_bytes is not None
            self.peak_bytes = max(self.peak_bytes, self._taken() - self._before)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    table = args.results / "gpu.csv"
    where = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu"
    work = args.work.absolute()
    for name in args.methods:
        key = _key(args, where, name)
        rows = read_rows(table)
        if any(_is(row, key) for row in rows):
            print(f"{name}: has its row", file=sys.stderr, flush=True)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        model = opt_like(work / f"{args.shape}-like-{args.blocks}", args.shape, args.blocks)
        run_dir = work / "-".join(key.values()).replace(" ", "_")
        row = _measure(args, model, run_dir, name)
        write_rows(table, _COLUMNS, [*rows, {**key, **row}])
        shutil.rmtree(run_dir)  # not before: the row would be lost with it
    write_page(args.results / "gpu.md", markdown(read_rows(table)))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", type=_methods, default=[*METHODS], metavar="NAME;...", help="; ".join(METHODS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="opt-6.7b")
    parser.add_argument("--blocks", type=int, help="default: all that the model has")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="room for the model and its runs: 60 GB")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    args.blocks = args.blocks or SHAPES[args.shape].num_blocks
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; to try the script: --device cpu --blocks 2 --num-samples 2")
    return args


def _methods(names: str) -> list[str]:
    wanted = [name.strip() for name in names.split(";")]
    for name in wanted:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name} is no method; there are {'; '.join(METHODS)}")
    return wanted


def _key(args: argparse.Namespace, where: str, method: str) -> dict[str, str]:
    values = (where, args.shape, args.blocks, args.num_samples, args.seqlen, method)
    return dict(zip(_KEY, map(str, values), strict=True))


def _is(row: dict[str, str], key: dict[str, str]) -> bool:
    return all(row[name] == value for name, value in key.items())


def _measure(args: argparse.Namespace, model: Path, run_dir: Path, method: str) -> dict[str, Any]:
    """Prune, or go on with a run that was stopped, and read what its steps have taken.

    What is taken on the card is known of a run that was not stopped: its steps do not record it.
    """
    flags = ("--sparsity", "0.7", *METHODS[method], "--device", args.device)
    amount = ("--num-samples", str(args.num_samples), "--seqlen", str(args.seqlen))
    text = ("--calibration", "pydocs", "--calibration-sampling", "random", "--evaluate", "", "--no-evaluate-dense")
    is_resumed = run_dir.exists()
    with CardMemory(args.device) as card:
        call((*LAMPCTL, "run", str(model), "--run-dir", str(run_dir), *flags, *amount, *text))
    commits = steps_of(run_dir)
    seconds = {
        f"seconds_{kind}": f"{sum(c['elapsed_s'] for c in commits if _kind(c['step']) == kind):.2f}"
        for kind in (*KINDS, "other")
    }
    gpu_bytes = [c["peak_device_bytes"] for c in commits if c["peak_device_bytes"] is not None]
    return {
        "peak_gpu_bytes": max(gpu_bytes, default=""),
        "peak_card_bytes": "" if card.peak_bytes is None or is_resumed else card.peak_bytes,
        "peak_process_bytes": max(c["peak_memory_bytes"] for c in commits if c["peak_memory_bytes"] is not None),
        "seconds": f"{sum(c['elapsed_s'] for c in commits):.2f}",
        **seconds,
        "machine": machine(),
        "torch": torch.__version__,
        "code": code_version(),
    }


def _kind(step: str) -> str:
    kind = step.partition("/")[0]
    return kind if kind in KINDS else "other"


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """A table for each device, shape and amount, beside the paper's figures."""
    lines = [
        "# Pruning on a GPU",
        "",
        "Models with random weights. Command: `python -m benchmarks.performance.gpu`, with the device, the shape and "
        "the amount that a heading names. Peak GPU memory is what tensors take; what is taken on the card beside it is "
        "the reserve of PyTorch's allocator and the libraries.",
    ]
    for common in dict.fromkeys(tuple(row[name] for name in _KEY[:-1]) for row in rows):
        those = [row for row in rows if tuple(row[name] for name in _KEY[:-1]) == common]
        device, shape, blocks, num_samples, seqlen = common
        heading = f"{shape}, {blocks} blocks, {num_samples} x {seqlen} tokens: {device}"
        circumstances = dict.fromkeys((row["machine"], row["torch"], row["code"]) for row in those)
        lines += ["", f"## {heading}", ""]
        lines += [f"{machine}; torch {version}; commit {code}." for machine, version, code in circumstances]
        lines += ["", *_table(those, int(blocks))]
    return lines


def _table(rows: Sequence[dict[str, str]], num_blocks: int) -> Iterable[str]:
    base = next((float(row["seconds"]) for row in rows if row["method"] == "SparseGPT"), None)
    taken = [kind for kind in (*KINDS, "other") if any(float(row[f"seconds_{kind}"]) for row in rows)]
    heads = ["", "peak GPU memory", "taken on the card", "the paper's", "peak memory of the process", "time"]
    heads += ["of SparseGPT's", *(f"{kind}, s" + (" a block" if kind.endswith("-block") else "") for kind in taken)]
    cells = []
    for row in sorted(rows, key=lambda row: [*METHODS].index(row["method"])):
        published = PUBLISHED_GB.get((row["shape"], row["method"]))
        seconds = [float(row[f"seconds_{kind}"]) / (num_blocks if kind.endswith("-block") else 1) for kind in taken]
        cells.append(
            [
                row["method"],
                *(_gb(row[name]) for name in ("peak_gpu_bytes", "peak_card_bytes")),
                "-" if published is None else f"{published:g} GB",
                _gb(row["peak_process_bytes"]),
                f"{float(row['seconds']):.0f} s",
                "-" if base is None else f"{float(row['seconds']) / base:.2f}",
                *(f"{value:.2f}" if value else "-" for value in seconds),
            ]
        )
    return markdown_table(heads, cells)


def _gb(size: str) -> str:
    return f"{int(size) / 1e9:.1f} GB" if size else "-"


if __name__ == "__main__":
    main()
