"""Checkpoints inside a step, so that a stop or a crash costs minutes of work, not the whole step.

    progress/<commit number>/<sequence number>
    progress/<commit number>/part-<token>/part.safetensors

A checkpoint saves time and nothing else. One that is torn, damaged, or of another history is ignored; then the one
before it is used, or the step starts from its beginning. The file begins with the sha256 of the rest, which is a
safetensors file whose header names the step and the record before it.

A state that is too large for one file is stored in parts (`keep`), each durable before a checkpoint names it with its
digest. A part is never overwritten: it goes once no checkpoint that is kept names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DamagedData, DiskError, FileExists, FileGone, Superseded
from pipeline.rundir import filesystem
from pipeline.rundir.filesystem import FileDigest, FileWriter
from pipeline.rundir.run_directory import RunDirectory
from pipeline.rundir.step_transaction import Attempt
from stages.interfaces import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_FORMAT = 1
_HEAD = "lampctl"
_DIGEST_SIZE = 64
# The newest may be torn by the crash that made it needed.
_NUM_KEPT = 2
_PART, _PART_FILE = "part-", "part.safetensors"


@dataclass(frozen=True)
class _StoredPart:
    """A part of a state on disk."""

    folder: str  # key
    digest: FileDigest

    @property
    def file(self) -> str:
        """Key of its file."""
        return f"{self.folder}/{_PART_FILE}"

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder.rpartition("/")[2], "size": self.digest.size, "sha256": self.digest.sha256}


class StepProgress:
    """The checkpoints of one step, which is the run's next commit."""

    def __init__(self, run: RunDirectory, step: str) -> None:
        self._run = run
        self._folder = run.progress_folder
        self._binding = {"format": _FORMAT, "step": step, "parent": run.newest_digest}
        self._began = time.monotonic()
        self.elapsed_before_s = 0.0  # seconds of earlier attempts, in what was restored
        self._parts: dict[str, _StoredPart] = {}  # the newest by name
        self._named: list[set[str]] = []  # folders of the parts that the newest checkpoints name
        self._token, self._num_parts = secrets.token_hex(4), 0

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
            parts = self._sound_parts(found.parts) if isinstance(found, _Decoded) else found
            if isinstance(found, str) or isinstance(parts, str):
                log.warning("passing over %s/%s: %s", self._run.label, key, parts)
                continue
            self.elapsed_before_s, self._parts = found.elapsed_s, parts
            self._named = [{part.folder for part in parts.values()}]
            self._drop_unnamed()
            self._run.event("step-restored", step=self._binding["step"], record=key)
            return found.checkpoint
        self._drop_unnamed()
        return None

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a part durably (`stages.interfaces.DurableCallbacks`).

        Raises:
            OutOfDisk, DiskError: It cannot be written. Unlike a checkpoint, the step needs it.
        """
        storage = self._run.storage
        folder = f"{self._folder}/{_PART}{self._token}-{self._num_parts:06d}"
        self._num_parts += 1
        try:
            digest = _write_part(storage.new_folder(folder, with_parents=True) / _PART_FILE, tensors)
            storage.keep(folder)
        except FileGone:
            raise self._lost(folder) from None
        before = self._parts.get(name)
        self._parts[name] = _StoredPart(folder, digest)
        if before is not None and not any(before.folder in named for named in self._named):
            storage.remove(before.folder)

    def kept(self, name: str) -> Mapping[str, Tensor]:
        """The newest part of this name; each tensor is read when it is asked for."""
        from stages.formats.checkpoint_files import StateFile

        part = self._parts[name]
        try:
            path = self._run.storage.local(part.file)
        except FileGone:
            raise self._lost(part.folder) from None
        if not path.exists():
            raise self._lost(part.folder)
        return StateFile(path)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint durably and delete older ones. A full disk loses only the checkpoint."""
        parts = {name: self._parts[name] for name in checkpoint.parts}
        data = _encode(checkpoint, self._binding, self.elapsed_s, {name: x.to_json() for name, x in parts.items()})
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
            self._named = [*self._named, {part.folder for part in parts.values()}][-_NUM_KEPT:]
            if self._parts:
                self._drop_unnamed()
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

    def _sound_parts(self, described: Mapping[str, Mapping[str, Any]]) -> dict[str, _StoredPart] | str:
        """The parts that a checkpoint names, or what is wrong with one."""
        parts = {}
        for name, found in described.items():
            part = _StoredPart(f"{self._folder}/{found['folder']}", FileDigest(found["size"], found["sha256"]))
            try:
                is_sound = filesystem.hash_file(self._run.storage.local(part.file)) == part.digest
            except FileGone:
                return f"its part {name} is gone"
            if not is_sound:
                self._run.storage.drop_copy(part.file)
                return f"its part {name} is damaged"
            parts[name] = part
        return parts

    def _drop_unnamed(self) -> None:
        """Delete the parts that neither the newest checkpoints nor the current state name."""
        wanted = {part.folder for part in self._parts.values()}.union(*self._named)
        for name in self._run.storage.names(self._folder):
            if name.startswith(_PART) and f"{self._folder}/{name}" not in wanted:
                self._run.storage.remove(f"{self._folder}/{name}")

    def _lost(self, folder: str) -> Superseded:
        """The error for a part that vanished: only another process that does the same step deletes it."""
        self._run.check_superseded()
        return Superseded(
            f"{self._run.label}/{folder} was deleted during {self._binding['step']}: another process does "
            "the same step. Nothing committed is lost"
        )

    def _names(self) -> list[str]:
        return [name for name in self._run.storage.names(self._folder) if name.isdigit() and len(name) == 6]


class ScratchParts:
    """Parts of a step's state where no checkpoint is made, for as long as an attempt lasts (`StepProgress.keep`)."""

    def __init__(self, attempt: Attempt) -> None:
        """attempt: has the scratch folder."""
        self._attempt = attempt
        self._paths: dict[str, Path] = {}
        self._num_made = 0

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a part."""
        path = self._attempt.scratch().folder / f"{_PART}{self._num_made:06d}.safetensors"
        self._num_made += 1
        _write_part(path, tensors)
        if name in self._paths:
            filesystem.remove_file(self._paths[name])
        self._paths[name] = path

    def kept(self, name: str) -> Mapping[str, Tensor]:
        """The newest part of this name."""
        from stages.formats.checkpoint_files import StateFile

        return StateFile(self._paths[name])


def _write_part(path: Path, tensors: Mapping[str, Tensor]) -> FileDigest:
    """Write a file of tensors in pieces. It is not durable yet."""
    from stages.formats.checkpoint_files import serialized

    with FileWriter(path) as writer:
        for piece in serialized({key: tensor.detach().to("cpu") for key, tensor in tensors.items()}):
            writer.write(piece)
    return writer.digest


@dataclass(frozen=True)
class _Decoded:
    """The contents of a record."""

    checkpoint: Checkpoint
    elapsed_s: float
    parts: Mapping[str, Mapping[str, Any]]  # by name: folder, size, sha256


def _encode(
    checkpoint: Checkpoint,
    binding: Mapping[str, Any],
    elapsed_s: float,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    import safetensors.torch  # late: with torch, which asking how far a run is does not need

    head = {"binding": binding, "figures": checkpoint.figures, "elapsed_s": elapsed_s}
    if parts:
        head["parts"] = parts
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in checkpoint.tensors.items()}
    body = safetensors.torch.save(tensors, metadata={_HEAD: json.dumps(head)})
    return hashlib.sha256(body).hexdigest().encode() + body


def _decode(data: bytes, binding: Mapping[str, Any]) -> _Decoded | str:
    """The contents of a record, or why there are none."""
    import safetensors.torch

    digest, body = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return "it is torn or damaged"
    try:
        head = json.loads(_metadata(body)[_HEAD])
        if head["binding"] != json.loads(json.dumps(binding)):
            return "it is of another step or another history"
        parts = {
            name: {"folder": _part_folder(found["folder"]), "size": int(found["size"]), "sha256": str(found["sha256"])}
            for name, found in head.get("parts", {}).items()
        }
        # Copied into memory of torch's own, whose alignment decides the last bits of a product.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(body).items()}
        return _Decoded(Checkpoint(tensors, head["figures"], tuple(parts)), float(head["elapsed_s"]), parts)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it is no progress record ({error})"


def _part_folder(name: Any) -> str:
    """The name of a part's folder as a record has it. Raises ValueError for one that this module does not make."""
    if not isinstance(name, str) or re.fullmatch(_PART + "[0-9a-f]{8}-[0-9]{6,}", name) is None:
        raise ValueError(f"{name!r} is no folder of a part")
    return name


def _metadata(body: bytes) -> dict[str, str]:
    """The metadata in a safetensors header. Raises ValueError, KeyError or TypeError for what is none."""
    size = int.from_bytes(body[:8], "little")
    if size > len(body):
        raise ValueError("its header is longer than the file")
    header: dict[str, dict[str, str]] = json.loads(body[8 : 8 + size])
    return header["__metadata__"]
