"""Lay out for a peer what lampctl would prune with: the same model folder, the same calibration windows.

    python -m benchmarks.quality.windows MODEL SOURCE FOLDER --num-samples 32 --seqlen 256 --skip 0

FOLDER/model becomes a link to the model's folder on this machine, FOLDER/windows.npy the token ids (samples, tokens).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy

from stages.data.drawing import Drawing
from stages.data.registry import parse_source
from stages.data.tokenization import calibration_tokens, load_tokenizer
from stages.models.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-samples", type=int, required=True)
    parser.add_argument("--seqlen", type=int, required=True)
    parser.add_argument("--skip", type=int, default=0)
    args = parser.parse_args()
    folder = resolve(args.model).path.resolve()
    tokenizer = load_tokenizer(folder)
    source = parse_source(args.source)
    tokens = calibration_tokens(source, tokenizer, Drawing(args.num_samples, args.seqlen, "contiguous", args.skip))
    args.folder.mkdir(parents=True, exist_ok=True)
    link = args.folder / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    numpy.save(args.folder / "windows.npy", tokens.numpy())
    print(json.dumps({"model": str(folder), "shape": list(tokens.shape)}))


if __name__ == "__main__":
    main()
