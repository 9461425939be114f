"""Prune a model with llm-compressor. Runs with the peer's own Python and knows nothing of lampctl.

    PEER_PYTHON -m benchmarks.quality.peer_prune FOLDER --pruner sparsegpt --sparsity 0.7 [--mask 2:4]

FOLDER/model is a folder of safetensors, FOLDER/windows.npy token ids (samples, tokens), as windows.py leaves them.
FOLDER/pruned becomes a copy of the model with the pruned weights in their original names and dtype, not compressed.
Prints its figures as one line of JSON, the last of its output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import numpy
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from transformers import AutoModelForCausalLM

from benchmarks.quality.saving import save_like

_PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
_UNSTRUCTURED = "0:0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pruner", choices=("sparsegpt", "wanda"), required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--mask", default=_UNSTRUCTURED, help="N:M, N of M zero; default: unstructured")
    args = parser.parse_args()
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype="auto")
    pruning_started = time.monotonic()
    oneshot(
        model=model,
        dataset=_loader(args.folder / "windows.npy"),
        recipe=_recipe(args.pruner, args.sparsity, args.mask),
        pipeline="sequential",
        moe_calibrate_all_experts=False,
    )
    oneshot_s = time.monotonic() - pruning_started
    save_like(args.folder / "model", model, args.folder / "pruned")
    figures = {
        "seconds": time.monotonic() - started,  # from reading the model to having written it
        "oneshot_s": oneshot_s,
        "peak_memory_bytes": _peak_memory_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    print("\n" + json.dumps(figures), flush=True)


def _recipe(pruner: str, sparsity: float, mask: str) -> SparseGPTModifier | WandaPruningModifier:
    """Linear layers of the blocks, never the head; SparseGPT's own settings as lampctl has them."""
    where = {"sparsity": sparsity, "mask_structure": mask, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if pruner == "wanda":
        return WandaPruningModifier(**where)
    return SparseGPTModifier(**where, block_size=128, dampening_frac=0.01)


def _loader(path: Path) -> torch.utils.data.DataLoader:
    """One window a batch, in the order of the file."""
    windows = torch.from_numpy(numpy.load(path))
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    return torch.utils.data.DataLoader(samples, batch_size=1, shuffle=False)


def _peak_memory_bytes() -> int:
    """The most memory that this process held. Not getrusage's, which remembers the parent's from before the exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


if __name__ == "__main__":
    main()
