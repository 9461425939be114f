"""Payloads of a pruning run: their names, how long each lives, and what a lost stream is rebuilt from.

``biased/i`` and ``dense/i`` are the *inputs* of block i, through pruned and through original blocks. ``compensated/i``,
``unrefined/i`` (pruned, fp32, to be trained) and ``pruned/i`` are weights of block i; ``masks/i`` holds its pruning
masks and quantization grids.
"""

from __future__ import annotations

from pipeline.engine.plan import Output

CALIBRATION = Output("calibration", is_kept=True)
MODEL = Output("model", is_kept=True)


def biased(block: int) -> Output:
    """Input of a block when all blocks before it are pruned."""
    sources = (CALIBRATION.name, *(pruned(before).name for before in range(block)))
    return Output(f"biased/{block}", is_stream=True, rebuilt_from=sources)


def dense(block: int) -> Output:
    """Input of a block in the original model."""
    return Output(f"dense/{block}", is_stream=True, rebuilt_from=(CALIBRATION.name,))


def compensated(block: int) -> Output:
    """Weights of a block, trained on its biased input, before it is pruned."""
    return Output(f"compensated/{block}")


def unrefined(block: int) -> Output:
    """Weights of a block, pruned and in fp32, before refinement."""
    return Output(f"unrefined/{block}")


def pruned(block: int) -> Output:
    """Finished block, in the dtype of the export: a shard of the exported model."""
    return Output(f"pruned/{block}", is_kept=True)


def masks(block: int) -> Output:
    """Pruning masks and quantization grids of a block."""
    return Output(f"masks/{block}", is_kept=True)
