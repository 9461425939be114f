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
| ``distilled/i`` | weights of block i as exported, where the run distills |
| ``distillation-set`` | samples to distill on, where they are not the calibration set |
| ``generated-set`` | samples to distill on beside those, which the original model wrote |
| ``teacher/i`` | activations: as ``dense/i``, on the samples to distill on |
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.engine.plan import Output

CALIBRATION = Output("calibration", is_kept=True)
DISTILLATION_SET = Output("distillation-set")
GENERATED_SET = Output("generated-set")
MODEL = Output("model", is_kept=True)


# Streams of the original model's output, by the payload with the samples.
_TEACHERS = {
    CALIBRATION.name: "teacher",
    DISTILLATION_SET.name: "teacher-on-set",
    GENERATED_SET.name: "teacher-on-generated",
}


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
    """Finished block, in the dtype of the export: a shard of the exported model, unless the run distills."""
    return Output(f"pruned/{block}", is_kept=True)


def distilled(block: int) -> Output:
    """Block after distillation, in the dtype of the export: a shard of the exported model."""
    return Output(f"distilled/{block}", is_kept=True)


def masks(block: int) -> Output:
    """Pruning masks and quantization grids of a block."""
    return Output(f"masks/{block}", is_kept=True)


def teacher(num_blocks: int, samples: Output) -> Output:
    """Output of the last block in the original model on these samples to distill on."""
    return Output(f"{_TEACHERS[samples.name]}/{num_blocks}", is_stream=True, rebuilt_from=(samples.name,))


@dataclass(frozen=True)
class StreamContents:
    """What an activation stream holds.

    Attributes:
        block: The block whose input it is.
        is_biased: The blocks before are pruned; otherwise they are those of the original model.
        samples: Payload with the samples.
    """

    block: int
    is_biased: bool
    samples: Output


def contents_of(name: str) -> StreamContents:
    """What the stream of this name holds."""
    kind, _, block = name.partition("/")
    sets = {_TEACHERS[samples.name]: samples for samples in (DISTILLATION_SET, GENERATED_SET)}
    return StreamContents(int(block), kind == "biased", sets.get(kind, CALIBRATION))
