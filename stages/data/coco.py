"""COCO's layout as a data source: one file of annotations for all images."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.data.image_source import Annotation, ImageRecord, ImageSource, Skipped
from stages.errors import UsageError
from stages.formats.file_digest import digest_file


@dataclass(frozen=True)
class COCO(ImageSource):
    """instances.json (or annotations/instances_*.json), and the images in the same folder or one below."""

    kind = "coco"
    title = "COCO"
    help = "A folder in COCO's layout: instances.json or annotations/instances_*.json, and the images."

    def records(self) -> tuple[list[ImageRecord], Skipped]:
        path, skipped = self._instances, Skipped()
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            images, annotations = content["images"], content["annotations"]
            grouped: dict[Any, list[Annotation]] = {}
            for entry in annotations:
                # A crowd is a region of many objects: no single point asks for it.
                if not entry.get("iscrowd"):
                    grouped.setdefault(entry["image_id"], []).append(Annotation(entry["segmentation"], ()))
            found = []
            for image in sorted(images, key=lambda image: str(image["file_name"])):
                name = str(image["file_name"])
                size = (int(image["height"]), int(image["width"]))
                if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                    skipped.add("named outside of the folder", Path(name[:200]))
                    continue
                place = _image_place(self.folder, path, name)
                if place is None:
                    skipped.add("annotated, but missing", self.folder / name[:200])
                else:
                    found.append(ImageRecord(place, size, tuple(grouped.get(image["id"], ()))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as COCO annotations ({type(error).__name__}: {error})") from error
        return found, skipped

    def _annotations_digest(self) -> bytes:
        return digest_file(self._instances).sha256.encode()

    @cached_property
    def _instances(self) -> Path:
        places = [self.folder / "instances.json", *sorted(self.folder.glob("annotations/instances_*.json"))]
        found = [place for place in places if place.is_file()]
        if not found:
            raise UsageError(f"{self.name}: neither instances.json nor annotations/instances_*.json is there")
        if len(found) > 1:
            names = ", ".join(str(place.relative_to(self.folder)) for place in found)
            raise UsageError(f"{self.name} has several files of annotations ({names}): keep the one that is meant")
        return found[0]


def _image_place(folder: Path, instances: Path, name: str) -> Path | None:
    """Where the image of this name is: in the folder itself, images/, or a folder of the split's name."""
    split = instances.stem.removeprefix("instances_")
    for place in (folder / name, folder / "images" / name, folder / split / name, folder / "images" / split / name):
        if os.path.isfile(place):  # False also for a name that no file system takes
            return place
    return None
