"""Payloads of a pruning run: their names, how long each lives, and what a lost stream is rebuilt from.

Each function gives one payload of a block, i, which counts from 0.

| name | what it holds |
|---|---|
| ``biased/i`` | activations: input of block i after the pruned blocks before it |
| ``dense/i`` | activations: input of block i in the original model |
| ``compensated/i`` | weights of block i in fp32, trained, not pruned yet |
| ``unrefined/i`` | weights of block i in fp32, pruned, to be trained |
| ``pruned/i`` | weights of block i as exported |
| ``masks/i`` | pruning masks and quantization grids of block i |
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


def stream_of(name: str) -> tuple[int, bool]:
    """Index of the block whose input a stream holds, and whether it is the biased one. Inverse of their names."""
    kind, _, block = name.partition("/")
    return int(block), kind == "biased"
