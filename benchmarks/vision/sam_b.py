"""SAM-B's real architecture, random weights: does it fit, and does block by block give what the encoder gives?

    python -m benchmarks.vision.sam_b coco:DIR [--num-images 80] [--work runs/sam-b]

First the whole encoder (12 blocks, one image) against `sam.image_encoder`, bit for bit in fp32. Then LAMP on a model of
two of its blocks (windows of 14 and global attention, 1024 pixels, 768 channels), from calibration to export, on so
many images of a COCO folder; it prints time and peak memory of every step. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reporting import ROOT, markdown_table
from stages.models.resolve import resolve
from stages.models.sam.checkpoint import write_folder
from stages.models.sam.encoder import SamEncoder
from stages.models.sam.modules import META_SIZES, SamSizes, build_sam

SIZES = META_SIZES["vit_b"]
TWO_BLOCKS = replace(SIZES, depth=2, global_attn_indexes=(1,))


def save(sizes: SamSizes, folder: Path) -> torch.nn.Module:
    """A model with random weights, in its positions as well, kept as a folder."""
    torch.manual_seed(0)
    sam = build_sam(sizes)
    with torch.no_grad():
        for name, weight in sam.named_parameters():
            if "pos" in name:
                weight.normal_(std=0.02)
    write_folder(sam.state_dict(), sizes, folder)
    return sam


@torch.no_grad()
def compare(folder: Path) -> str:
    """The encoder's own forward against ours, one block in memory at a time."""
    sam = save(SIZES, folder)
    device, pixels = torch.device("cpu"), torch.randn(1, 3, 1024, 1024)
    expected = sam.image_encoder(pixels)
    del sam
    model = SamEncoder(resolve(str(folder)))
    hidden = model.load_ends(device, "enter").enter(pixels).hidden
    for index in range(model.num_blocks):
        block = model.load_block(index, device)
        hidden = model.run_block(block, hidden, model.load_ends(device, "enter").enter(pixels).calls[index])
    found = model.load_ends(device, "leave").leave(pixels, hidden)
    if not torch.equal(found, expected):
        raise SystemExit(f"block by block differs by up to {(found - expected).abs().max():.3g}")
    return f"{model.num_blocks} blocks one by one: equal to image_encoder(x) in every bit of {found.numel():,} numbers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="coco:DIR")
    parser.add_argument("--num-images", type=int, default=80)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "sam-b")
    options = parser.parse_args()
    print(compare(options.work / "whole"), flush=True)
    save(TWO_BLOCKS, options.work / "two-blocks")
    command = [sys.executable, "-m", "lampctl", "run", str(options.work / "two-blocks"), "--sparsity", "0.7"]
    command += ["--calibration", options.images, "--num-samples", str(options.num_images), "--evaluate", ""]
    command += [
        "--pruner",
        "sparsegpt",
        "--epochs",
        "1",
        "--refine-epochs",
        "1",
        "--run-dir",
        str(options.work / "run"),
    ]
    subprocess.run(command, check=True)
    commits = [json.loads(path.read_text()) for path in sorted((options.work / "run" / "commits").glob("*.json"))]
    cells = [(c["step"], f"{c['elapsed_s']:.0f}", f"{c['peak_memory_bytes'] / 1e9:.2f} GB") for c in commits]
    print("\n".join(markdown_table(("step", "seconds", "peak memory"), cells)))


if __name__ == "__main__":
    main()
