"""How near the arithmetic and the activation store come to what the machine can do (P1 and P8 of speed.py)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.rundir import filesystem
from pipeline.rundir.activation_store import ScratchStreams, open_stream, stream_spec, write_stream
from pipeline.rundir.records import Payload, PayloadFile, StreamSpec
from pipeline.rundir.storage.local import FolderStorage
from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.in_memory import ListStream, NullCallbacks
from stages.machine.autotune import best_of
from stages.machine.device import DTYPES, DeviceChoices, apply, choose
from stages.models.base import BlockModel
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.runtime.block_context import StageContext
from stages.runtime.block_runner import BlockRunner
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings

NUM_SAMPLES, SEQLEN = 32, 256
_STORE_BYTES = 64 << 20
_CHUNKS_MB = (0.5, 4, 16)


def arithmetic(model_name: str, dtype: str, folder: Path, repeats: int = 3) -> list[dict[str, Any]]:
    """P1: the rate of model FLOP of each kind of pass, streams on the disk, over the best rate for its products."""
    choices = choose("cpu", dtype)
    apply(choices)
    model = open_model(resolve(model_name))
    torch.manual_seed(0)
    inputs = ListStream(NUM_SAMPLES, (SEQLEN,), torch.int64)
    for index in range(NUM_SAMPLES):
        inputs.write(index, torch.randint(0, model.vocab_size, (SEQLEN,)))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scratch = ScratchStreams(folder)
    biased, dense, dense_out, biased_out = (
        scratch.stream(name, NUM_SAMPLES, (SEQLEN, model.hidden_size), choices.torch_dtype)
        for name in ("biased", "dense", "dense out", "biased out")
    )
    context = StageContext(model, inputs, choices, NullCallbacks())
    capture(context, biased, dense)
    one_pass_s = _ideal_pass_s(model, choices) * NUM_SAMPLES
    settings = TrainingSettings(epochs=1, lr=Rate(1e-4), lr_decay=1.0, holds_out=False, seed=0)

    def do_capture() -> None:
        capture(context, biased, dense)

    block = model.load_block(1, choices.torch_device)
    runner = BlockRunner(model, block, 1, inputs, choices)

    def do_propagate() -> None:
        runner.propagate(biased, biased_out, lambda: None, lambda count: None)

    def do_compensate() -> None:
        compensate_block(context.block(1), biased, dense, dense_out, settings)

    # Forward passes that each does over all samples; a training step is three. Two passes come before training, one
    # after it, for the loss that is reported.
    work: dict[str, tuple[Callable[[], None], float]] = {
        "capture": (do_capture, 1),
        "propagate": (do_propagate, 1),
        "compensate": (do_compensate, 2 + 3 + 1),
    }
    rows = []
    for name, (do, passes) in work.items():
        seconds = best_of(do, repeats)
        rows.append({"pass": name, "dtype": dtype, "share": passes * one_pass_s / seconds, "seconds": seconds})
    scratch.close()
    return rows


def _ideal_pass_s(model: BlockModel, choices: DeviceChoices) -> float:
    """Seconds that the matrix products of one forward pass over a sample take, each at its best rate here."""
    block = model.load_block(0, choices.torch_device)
    seconds = flops = 0.0
    with torch.no_grad():
        for layer in model.layers(0):
            weight = model.weight_matrix(block.get_submodule(layer.path)).to(DTYPES[choices.dtype])
            x = torch.randn(SEQLEN, layer.cols).to(weight.dtype)
            seconds += best_of(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), 20)
            flops += 2 * SEQLEN * weight.numel()
    attention = 4 * SEQLEN * SEQLEN * model.hidden_size
    return seconds * (1 + attention / flops)  # attention's two products at the mean rate of the others


def store(folder: Path, repeats: int = 5) -> list[dict[str, Any]]:
    """P8: rates of the activation store over raw files of the same bytes, both flushed; reads from a cold cache."""
    rows = []
    for megabytes in _CHUNKS_MB:
        size = int(megabytes * (1 << 20))
        count = max(_STORE_BYTES // size, 2)
        samples = [torch.randn(SEQLEN, size // 4 // SEQLEN) for _ in range(2)]
        times: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, seconds in _store_once(folder, samples, count).items():
                times.setdefault(name, []).append(seconds)
        best = {name: min(found) for name, found in times.items()}
        rows.append(
            {
                "chunk_mb": megabytes,
                "write_ratio": best["raw write"] / best["store write"],
                "read_ratio": best["raw read"] / best["store read"],
                "raw_write_mb_s": count * megabytes / best["raw write"],
                "raw_read_mb_s": count * megabytes / best["raw read"],
            }
        )
    return rows


def _store_once(folder: Path, samples: list[torch.Tensor], count: int) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    raw, ours = folder / "raw", folder / "ours"
    raw.mkdir(parents=True)
    ours.mkdir()
    spec = stream_spec(count, tuple(samples[0].shape), torch.float32)

    def write_raw() -> None:
        for index in range(count):
            with (raw / str(index)).open("wb") as file:
                file.write(memoryview(samples[index % 2].numpy()))
        filesystem.flush_tree(raw)

    def write_ours() -> None:
        stream = write_stream(ours, spec)
        for index in range(count):
            stream.write(index, samples[index % 2])
        stream.seal("data")
        filesystem.flush_tree(ours)

    def read_raw() -> None:
        for index in range(count):
            (raw / str(index)).read_bytes()

    def read_ours() -> None:

        stream = open_stream(FolderStorage(folder), payload)
        for index in range(count):
            _ = stream[index]

    found = {"raw write": _once(write_raw), "store write": _once(write_ours)}
    payload = _payload(ours, spec)
    for path in folder.rglob("*"):
        if path.is_file():
            _forget(path)
    return {**found, "raw read": _once(read_raw), "store read": _once(read_ours)}


def _payload(folder: Path, spec: StreamSpec) -> Payload:
    files = []
    for path in sorted(folder.iterdir()):
        digest = filesystem.hash_file(path)
        files.append(PayloadFile(path=f"{folder.name}/{path.name}", size=digest.size, sha256=digest.sha256))
    return Payload(kind="stream", root=folder.name, files=tuple(files), stream=spec)


def _forget(path: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _once(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
