"""SA-1B as a data source: each image with a JSON file of annotations beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.image_source import Annotation, ImageRecord, ImageSource, Skipped, UnusableImageError


@dataclass(frozen=True)
class SA1B(ImageSource):
    """An unpacked archive of SA-1B: sa_123.jpg with sa_123.json beside it."""

    kind = "sa1b"
    title = "SA-1B"
    help = "An unpacked archive of SA-1B: sa_1.jpg with sa_1.json beside it."

    def records(self) -> tuple[list[ImageRecord], Skipped]:
        files, skipped = self._image_files()
        records = []
        for path in files:
            if path.with_suffix(".json").is_file():
                records.append(ImageRecord(path, None))
            else:
                skipped.add("without annotations", path)
        pictured = {path.with_suffix(".json") for path in files}
        for path in sorted(self.folder.rglob("*.json")):
            if path not in pictured:
                skipped.add("annotated, but missing", path)
        return records, skipped

    def annotated(self, record: ImageRecord) -> ImageRecord:
        return _read_record(record.path)

    def _annotation_digest(self, record: ImageRecord) -> bytes:
        return f"{record.path.with_suffix('.json').stat().st_size}\0".encode()


def _read_record(path: Path) -> ImageRecord:
    """The image with the annotations of its JSON file. Raises UnusableImageError if they cannot be read."""
    try:
        content: Mapping[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8-sig"))
        size = (int(content["image"]["height"]), int(content["image"]["width"]))
        annotations = tuple(
            Annotation(entry["segmentation"], tuple((float(x), float(y)) for x, y in entry.get("point_coords", ())))
            for entry in content["annotations"]
            if not entry.get("iscrowd")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UnusableImageError("with annotations that cannot be read") from error
    return ImageRecord(path, size, annotations)
