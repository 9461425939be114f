"""The export format "packed": one file without the masked weights, which unpacks to the model folder bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.formats.base import ExportFormat

if TYPE_CHECKING:
    from stages.formats.base import FormatContext, PackedSizes


class PackedFormat(ExportFormat):
    """One safetensors file: kept weights, or their quantization codes, and pruning masks of one bit a weight."""

    name = "packed"
    title = "packed model"
    help = "one file without the masked weights; with --bits, B bits per weight."
    suffix = ".packed.safetensors"
    can_restore = True

    @classmethod
    def write(cls, folder: Path, target: Path, context: FormatContext) -> None:
        from stages.formats.packed.writer import pack

        pack(folder, target, context)

    @classmethod
    def holds(cls, file: Path, folder: Path) -> bool:
        from stages.errors import DamagedFileError, UsageError
        from stages.formats.packed.layout import open_packed, read_contents
        from stages.formats.packed.writer import is_packed_from

        try:
            with open_packed(file) as packed:
                return is_packed_from(read_contents(packed), folder)
        except (UsageError, DamagedFileError):
            return False

    @classmethod
    def require_restorable(cls, file: Path) -> None:
        from stages.formats.packed.layout import open_packed

        open_packed(file).close()

    @classmethod
    def restore(cls, file: Path, folder: Path, context: FormatContext) -> None:
        from stages.formats.packed.reader import unpack

        unpack(file, folder, context)

    @classmethod
    def sizes(cls, file: Path) -> PackedSizes:
        from stages.formats.packed.layout import packed_sizes

        return packed_sizes(file)
