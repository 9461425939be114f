"""Peak memory and time of pruning a block of many experts, by the room that its statistics get: docs/experts.md.

    python -m benchmarks.experts_memory            # a quarter of an hour on 2 cores
    python -m benchmarks.experts_memory --num-samples 8   # few tokens: experts wait for the sum over all of them

One block of random weights: 32 experts, 2 a token, hidden size 512, experts of width 2048. Each row is a process of its
own, which prunes the block by SparseGPT on random tokens. Beside it: what a spill to disk would take instead of passes,
writing all statistics and reading them back, once for each micro-batch that adds to them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reporting import RESULTS, markdown_table, read_rows, write_page, write_rows

HIDDEN, WIDTH, NUM_EXPERTS, SEQLEN = 512, 2048, 32, 512
# Shares of the statistics that fit at once; None: no limit.
SHARES = ("none", "0.5", "0.3", "0.15", "0")
FIELDS = ("samples", "share", "room_mb", "passes", "peak_mb", "collecting_s", "step_s", "spill_s", "digest")


def make(folder: Path) -> None:
    """Save the model, a folder without tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


class RandomStream:
    """Hidden states that are drawn when they are read; what is written is dropped. A run has them on disk."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int, /) -> Any:
        import torch

        return torch.randn(SEQLEN, HIDDEN, generator=torch.Generator().manual_seed(index))

    def write(self, index: int, sample: Any, /) -> None:
        """Drop the sample."""


def measure(folder: Path, share: str, num_samples: int) -> dict[str, Any]:
    """A row: prune the block in this process."""
    import torch

    import stages.prune_block as stage
    from stages.export import block_dtypes
    from stages.in_memory import NullCallbacks
    from stages.machine.device import DeviceChoices, PeakMemory, apply
    from stages.models.decoder import open_model
    from stages.models.resolve import resolve
    from stages.pruners.base import PruneOptions
    from stages.pruners.sparsegpt import SparseGPT
    from stages.runtime.block_context import BlockOutput, StageContext
    from stages.sparsity.budget import LayerShape, allocate

    device = DeviceChoices("cpu", "float32", 1, "highest", "", batch_tokens=SEQLEN)
    apply(device)
    model = open_model(resolve(str(folder)))
    inputs = [torch.zeros(SEQLEN, dtype=torch.long)] * num_samples
    hidden = RandomStream(num_samples)
    layers = model.layers(0)
    budget = allocate(
        [[LayerShape(x.name, x.role, x.rows, x.cols) for x in layers if x.role != "vital"]], 0.5, 1.0, 0.0
    )
    size = 4 * (2 * HIDDEN**2 + NUM_EXPERTS * (HIDDEN**2 + WIDTH**2))
    room = None if share == "none" else int(float(share) * size)
    context = StageContext(model, inputs, device, NullCallbacks()).block(0)
    times, collect = [], stage.collect

    def timed(*arguments: Any) -> None:
        start = time.process_time()
        collect(*arguments)
        times.append(time.process_time() - start)

    stage.collect = timed
    output = BlockOutput(block_dtypes(model, 0, "original"), hidden)
    peak, start = PeakMemory(device.torch_device), time.process_time()
    result = stage.prune_block(context, SparseGPT(PruneOptions()), budget[0], hidden, output=output, room_bytes=room)
    seconds, peak_bytes = time.process_time() - start, peak.process_bytes()
    assert result.finished is not None
    digest = hashlib.sha256()
    for _, tensor in sorted(result.finished.state.items()):
        digest.update(tensor.numpy().tobytes())
    return {
        "samples": num_samples,
        "share": share,
        "room_mb": round((size if room is None else room) / 1e6),
        "passes": len(times),
        "peak_mb": round(peak_bytes / 1e6),
        "collecting_s": round(sum(times), 1),
        "step_s": round(seconds, 1),
        "spill_s": round(num_samples * _spill_s(folder, size), 1) if share == "none" else "",
        "digest": digest.hexdigest()[:16],
    }


def _spill_s(folder: Path, size: int) -> float:
    """Seconds of writing this many bytes beside the model, and of reading them back: the best of three."""
    return min(_write_and_read_s(folder, size) for _ in range(3))


def _write_and_read_s(folder: Path, size: int) -> float:
    piece = os.urandom(1 << 24)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(len(piece)):
            pass
    return time.perf_counter() - start


def page(rows: list[dict[str, str]], command: str) -> list[str]:
    """A page of Markdown."""
    heads = (
        "samples of 512 tokens",
        "room for statistics, MB",
        "passes",
        "peak memory, MB",
        "collecting, s",
        "step, s",
    )
    keys = ("samples", "room_mb", "passes", "peak_mb", "collecting_s", "step_s")
    spills = "; ".join(
        f"{row['samples']} samples: {row['spill_s']} s, {row['samples']} times {row['room_mb']} MB to disk and back"
        for row in rows
        if row["spill_s"]
    )
    same = all(len({row["digest"] for row in rows if row["samples"] == n}) == 1 for n in {r["samples"] for r in rows})
    equal = "the same" if same else "NOT the same"
    return [
        "# Memory of experts' statistics",
        "",
        f"Command: `{command}`. A block of {NUM_EXPERTS} experts, hidden size {HIDDEN}, width {WIDTH}, SparseGPT, one "
        f"thread; processor seconds. The weights of all rows with the same samples are {equal}.",
        "",
        *markdown_table(heads, [[row[key] for key in keys] for row in rows]),
        "",
        f"A spill of the statistics at every micro-batch, from the best of three such transfers: {spills}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/lampctl-experts-memory"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--num-samples", type=int, nargs="*", default=[8, 128])
    parser.add_argument("--share", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.work / "model"
    if args.share is not None:
        print(json.dumps(measure(model, args.share, args.num_samples[0])))
        return
    if not (model / "config.json").exists():
        make(model)
    path = args.results / "experts_memory.csv"
    rows: list[dict[str, Any]] = [*read_rows(path)]
    for num_samples in args.num_samples:
        for share in SHARES:
            if any((str(row["samples"]), row["share"]) == (str(num_samples), share) for row in rows):
                continue
            command = [sys.executable, "-m", "benchmarks.experts_memory", "--work", str(args.work)]
            command += ["--share", share, "--num-samples", str(num_samples)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], flush=True)
            write_rows(path, FIELDS, rows)
    write_page(args.results / "experts_memory.md", page(read_rows(path), "python -m benchmarks.experts_memory"))


if __name__ == "__main__":
    main()
