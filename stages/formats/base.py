"""Export format: how a pruned model is written for its users."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from stages.formats.safetensors_io import Sink
    from stages.interfaces import Watcher

# Files of a model folder that follow from its other files: by name, what writes one. A function of the folder, since
# only a model family knows them (`stages.models.derived_files`).
Write = Callable[[bytes], object]
DerivedFiles = Callable[[Path], Mapping[str, Callable[[Write], None]]]


def no_derived_files(folder: Path) -> Mapping[str, Callable[[Write], None]]:
    """For folders in which no file follows from the others."""
    return {}


@dataclass(frozen=True)
class PackedSizes:
    """Bytes on disk: of the folder's weights, of the packed file, and of what is in it."""

    dense_bytes: int  # the safetensors files of the folder, without masks/
    packed_bytes: int
    masks_bytes: int
    scales_bytes: int  # scales and zero points of grids
    codes_bytes: int
    values_bytes: int  # of pruned layers that have no codes
    untouched_bytes: int  # all other weights: not pruned, or part of a tensor that holds all experts of a block
    files_bytes: int  # tokenizer, configuration and other files
    described_bytes: int  # names, shapes, digests

    @property
    def ratio(self) -> float:
        """Packed to dense."""
        return self.packed_bytes / self.dense_bytes

    def record(self) -> dict[str, float]:
        """All figures by name."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class FormatContext:
    """What writing and restoring a file need beside the two paths."""

    callbacks: Watcher  # asked for stops and informed of progress
    create: Callable[[Path], Sink]  # opens a new file for writing
    derived: DerivedFiles = no_derived_files  # the files that follow from others, which need not be stored


class ExportFormat(ABC):
    """One form of an exported model.

    A format with a `suffix` is one file, made from the exported model folder by `write`. A format without one is the
    model folder itself, which the export step of a run writes. A format that `can_restore` makes the folder of its file
    again, bit for bit: ``lampctl export --unpack FILE``.
    """

    name: ClassVar[str]  # the value of --format
    title: ClassVar[str]  # for people
    help: ClassVar[str]  # one line
    suffix: ClassVar[str | None] = None  # of the file's default name, as ".packed.safetensors"
    can_restore: ClassVar[bool] = False

    @classmethod
    def write(cls, folder: Path, target: Path, context: FormatContext) -> None:
        """Write a model folder as one file. The caller makes it durable and removes it after a failure.

        Args:
            folder: The model folder, with pruning masks.
            target: The file, which does not exist.
            context: Progress, and how files are opened.

        Raises:
            UsageError: The folder is no pruned model, or this format cannot hold it.
            ResourceError: A file of the folder is damaged.
        """
        raise NotImplementedError(f"{cls.name} is written by the export step")

    @classmethod
    def holds(cls, file: Path, folder: Path) -> bool:
        """Whether a file of this format was written from exactly this model folder."""
        return False

    @classmethod
    def require_restorable(cls, file: Path) -> None:
        """Check that `restore` reads this file.

        Raises:
            UsageError: It is of another format, or of a newer version.
            DamagedFileError: It is of this format and cannot be read.
        """
        raise NotImplementedError(f"{cls.name} does not restore the model folder")

    @classmethod
    def restore(cls, file: Path, folder: Path, context: FormatContext) -> None:
        """Make the model folder of a file again. The caller makes it durable and removes it after a failure.

        Args:
            file: A file that `write` wrote.
            folder: The folder, which is missing or empty.
            context: Progress, and how files are opened.

        Raises:
            UsageError: The file is of another format, or of a newer version.
            DamagedFileError: What was written does not come back to the last bit.
        """
        raise NotImplementedError(f"{cls.name} does not restore the model folder")

    @classmethod
    def sizes(cls, file: Path) -> PackedSizes | None:
        """What takes how many bytes in the file; None if only its whole size is known."""
        return None
