"""Checkpoints inside a step, so that a stop or a crash costs minutes of work, not the whole step.

    progress/<commit number>/<sequence number>

A checkpoint saves time and nothing else. One that is torn, damaged, or of another history is ignored; then the one
before it is used, or the step starts from its beginning. The file begins with the sha256 of the rest, which is a
safetensors file whose header names the step and the record before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from pipeline.errors import DamagedData, DiskError, FileExists, FileGone
from pipeline.rundir.run_directory import RunDirectory
from stages.interfaces import Checkpoint

log = logging.getLogger(__name__)

_FORMAT = 1
_HEAD = "lampctl"
_DIGEST_SIZE = 64
# The newest may be torn by the crash that made it needed.
_NUM_KEPT = 2


class StepProgress:
    """The checkpoints of one step, which is the run's next commit."""

    def __init__(self, run: RunDirectory, step: str) -> None:
        self._run = run
        self._folder = run.progress_folder
        self._binding = {"format": _FORMAT, "step": step, "parent": run.newest_digest}
        self._began = time.monotonic()
        self.elapsed_before_s = 0.0  # seconds of earlier attempts, in what was restored

    def restore(self) -> Checkpoint | None:
        """The newest sound checkpoint of this step; None if there is none."""
        for name in reversed(self._names()):
            key = f"{self._folder}/{name}"
            try:
                data = self._run.storage.read(key)
            except (FileGone, DamagedData, DiskError) as error:
                log.warning("passing over a progress record: %s", error)
                continue
            found = _decode(data, self._binding)
            if isinstance(found, str):
                log.warning("passing over %s/%s: %s", self._run.label, key, found)
                continue
            checkpoint, self.elapsed_before_s = found
            self._run.event("step-restored", step=self._binding["step"], record=key)
            return checkpoint
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint durably and delete older ones. A full disk loses only the checkpoint."""
        data = _encode(checkpoint, self._binding, self.elapsed_s)
        names = self._names()
        number = int(names[-1]) + 1 if names else 0
        try:
            while True:
                key = f"{self._folder}/{number:06d}"
                try:
                    self._run.storage.create(key, data)
                    break
                except FileExists:  # of another process that works on this step, too
                    number += 1
            for name in self._names()[:-_NUM_KEPT]:
                self._run.storage.remove(f"{self._folder}/{name}")
        except FileGone:
            self._run.check_superseded()
            raise
        except DiskError as error:
            log.warning("how far %s is could not be kept: %s", self._binding["step"], error)
            return
        self._run.event("step-kept", step=self._binding["step"], record=key, size_bytes=len(data))

    @property
    def elapsed_s(self) -> float:
        """Seconds of work on the step, those of earlier attempts included."""
        return self.elapsed_before_s + time.monotonic() - self._began

    def _names(self) -> list[str]:
        return [name for name in self._run.storage.names(self._folder) if name.isdigit() and len(name) == 6]


def _encode(checkpoint: Checkpoint, binding: Mapping[str, Any], elapsed_s: float) -> bytes:
    import safetensors.torch  # late: with torch, which asking how far a run is does not need

    head = {"binding": binding, "figures": checkpoint.figures, "elapsed_s": elapsed_s}
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in checkpoint.tensors.items()}
    body = safetensors.torch.save(tensors, metadata={_HEAD: json.dumps(head)})
    return hashlib.sha256(body).hexdigest().encode() + body


def _decode(data: bytes, binding: Mapping[str, Any]) -> tuple[Checkpoint, float] | str:
    """The checkpoint and its seconds, or why there is none."""
    import safetensors.torch

    digest, body = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return "it is torn or damaged"
    try:
        head = json.loads(_metadata(body)[_HEAD])
        if head["binding"] != json.loads(json.dumps(binding)):
            return "it is of another step or another history"
        # Copied into memory of torch's own, whose alignment decides the last bits of a product.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(body).items()}
        return Checkpoint(tensors, head["figures"]), float(head["elapsed_s"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"it is no progress record ({error})"


def _metadata(body: bytes) -> dict[str, str]:
    """The metadata in a safetensors header. Raises ValueError, KeyError or TypeError for what is none."""
    size = int.from_bytes(body[:8], "little")
    if size > len(body):
        raise ValueError("its header is longer than the file")
    header: dict[str, dict[str, str]] = json.loads(body[8 : 8 + size])
    return header["__metadata__"]
