"""Perplexity of a small mixture of experts, dense and pruned, by every method: the table of docs/experts.md.

    python -m benchmarks.experts            # half an hour on 2 cores; resumes where it was stopped
    python -m benchmarks.experts --steps 50 --num-samples 8 --work /tmp/experts   # a quick look

The model, 2 of 8 experts a token, is trained here on the calibration part of `pydocs`; perplexity is that of the
evaluation part. Every cell is a run of `lampctl run`; rows are kept in results/experts.csv, and the
page is made of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.reporting import RESULTS, ROOT, markdown_table, read_rows, write_page, write_rows

METHODS = {"lamp": "LAMP", "sparsegpt": "SparseGPT", "wanda": "Wanda", "magnitude": "magnitude"}
SPARSITIES = ("0.5", "0.7")
FIELDS = ("sparsity", "method", "perplexity", "seconds")
SEQLEN = 128
DENSE = ("0", "dense")


def train(folder: Path, num_steps: int) -> None:
    """Train the model and save it with the tokenizer of examples/tiny-opt."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from stages.data.registry import parse_source
    from stages.data.tokenization import tokenize

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-opt")
    tokens = tokenize(tokenizer, parse_source("pydocs").text("calibration"))
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=SEQLEN,
            output_router_logits=True,  # with the loss that balances the experts
            router_aux_loss_coef=0.01,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps, pct_start=0.1)
    for step in range(1, num_steps + 1):
        starts = torch.randint(0, len(tokens) - SEQLEN, (8,))
        batch = torch.stack([tokens[start : start + SEQLEN] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(model: Path, sparsity: str, method: str, num_samples: int, *, dense: bool) -> list[dict[str, object]]:
    """Rows of a run, of the dense model too if it is asked for."""
    place = model.parent / f"{method}-{sparsity}"
    data = ["--calibration", "pydocs", "--num-samples", str(num_samples), "--seqlen", str(SEQLEN)]
    data += ["--evaluate", "pydocs", "--device", "cpu", "--threads", "1", *([] if dense else ["--no-evaluate-dense"])]
    goal = ["--sparsity", sparsity, "--method", method]
    command = [sys.executable, "-m", "lampctl", "run", str(model), *goal, *data, "--run-dir", str(place), "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    seconds, rows = round(time.perf_counter() - start), []
    for found in json.loads(done.stdout)["evaluations"]:
        at, name = (sparsity, method) if found["which"] == "pruned" else DENSE
        rows.append({"sparsity": at, "method": name, "perplexity": found["perplexity"], "seconds": seconds})
    return rows


def page(rows: list[dict[str, str]], command: str) -> list[str]:
    """A page of Markdown: methods down, sparsities across."""
    values = {(row["sparsity"], row["method"]): f"{float(row['perplexity']):.2f}" for row in rows}
    lines = [[title, *(values[at, method] for at in SPARSITIES)] for method, title in METHODS.items()]
    return [
        "# Perplexity of a small mixture of experts",
        "",
        f"Command: `{command}`. Perplexity on the evaluation part of `pydocs`. Dense: {values[DENSE]}.",
        "",
        *markdown_table(["", *(f"{100 * float(at):.0f}%" for at in SPARSITIES)], lines),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/lampctl-experts"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--num-samples", type=int, default=128)
    args = parser.parse_args()
    model = args.work / "model"
    if not (model / "tokenizer.json").exists():
        train(model, args.steps)
    path = args.results / "experts.csv"
    rows: list[dict[str, object]] = [*read_rows(path)]
    for sparsity in SPARSITIES:
        for method in METHODS:
            if not any((row["sparsity"], row["method"]) == (sparsity, method) for row in rows):
                rows += measure(model, sparsity, method, args.num_samples, dense=not rows)
                write_rows(path, FIELDS, rows)
    write_page(args.results / "experts.md", page(read_rows(path), "python -m benchmarks.experts"))


if __name__ == "__main__":
    main()
