"""The paper's Table 6 on this machine: memory and time of pruning OPT-6.7B. See gpu.md.

    python -m benchmarks.performance.gpu

A model of OPT-6.7B's shape with random weights stands in for it: memory and time do not depend on the values, and
nothing is downloaded. Writes benchmarks/results/gpu.md. --device cpu --blocks 2 --num-samples 2 tries it anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.performance.models import opt_6_7b_like
from benchmarks.performance.runs import LAMPCTL, run
from benchmarks.reporting import RESULTS, machine, markdown_table, software, write_page

METHODS = {
    "SparseGPT": ("--method", "sparsegpt"),
    "Wanda": ("--method", "wanda"),
    # Settings as published; one epoch, as the public code closest to the paper has it for models of this size.
    "LAMP as published": ("--method", "lamp", "--preset", "paper", "--epochs", "1"),
    "LAMP, effort low": ("--method", "lamp", "--effort", "low"),
}
PUBLISHED_GB = {"SparseGPT": "8.3", "Wanda": "21", "LAMP as published": "7.8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="room for the model and its runs: 60 GB")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; to try the script: --device cpu --blocks 2 --num-samples 2")
    work = args.work.absolute()
    model = opt_6_7b_like(work / f"opt-6.7b-like-{args.blocks}", args.blocks)
    amount = ("--num-samples", str(args.num_samples), "--seqlen", str(args.seqlen), "--device", args.device)
    text = ("--calibration", "pydocs", "--calibration-sampling", "random", "--evaluate", "", "--no-evaluate-dense")
    rows = []
    for name, flags in METHODS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        run(model, work / "run", "--sparsity", "0.7", *flags, *amount, *text)
        answer = subprocess.run((*LAMPCTL, "status", str(work / "run"), "--json"), capture_output=True, check=True)
        state = json.loads(answer.stdout)
        rows.append((name, state["peak_device_bytes"], state["peak_memory_bytes"], state["pruning_s"]))
    device = torch.cuda.get_device_name() if args.device != "cpu" else machine()
    report = markdown(
        rows, f"{device}; {software()}", f"{args.blocks} blocks, {args.num_samples} x {args.seqlen} tokens"
    )
    write_page(RESULTS / "gpu.md", report)


def markdown(rows: list[tuple[str, int | None, int, float]], where: str, amount: str) -> list[str]:
    """The table, beside the paper's."""
    base = rows[0][3]
    cells = []
    for name, device_bytes, process_bytes, seconds in rows:
        gpu = "-" if device_bytes is None else f"{device_bytes / 1e9:.1f} GB"
        published = f"{PUBLISHED_GB[name]} GB" if name in PUBLISHED_GB else "-"
        memory = (gpu, published, f"{process_bytes / 1e9:.1f} GB")
        cells.append((name, *memory, f"{seconds:.0f} s", f"{seconds / base:.2f}"))
    heads = ("", "peak GPU memory", "the paper's", "peak memory of the process", "time", "of SparseGPT's")
    return [
        "# Pruning OPT-6.7B's shape",
        "",
        f"{amount}, random weights. {where}. Command: `python -m benchmarks.performance.gpu`",
        "",
        *markdown_table(heads, cells),
    ]


if __name__ == "__main__":
    main()
