"""Conformance kit for data sources: `check_data_source` raises AssertionError with the requirement that one fails."""

from __future__ import annotations

import json
from pathlib import Path

from stages.data.base import DataSource
from stages.data.image_decoding import decode_mask, read_pixels
from stages.data.image_source import ImageSource
from stages.data.registry import DATA_SOURCES, parse_source
from stages.data.text_source import TextSource
from stages.errors import UsageError

_NOWHERE = "/no/such/place"


def check_data_source(entry: type[DataSource] | str, path: Path | str | None = None) -> None:
    """Check a kind of data source on data of that kind.

    Requirements: name, title, help and forms are complete; a source is found by its canonical name again; a missing
    path is refused; local data pass `check`; the digest is JSON and the same at every call; documents or images are
    the same at every call and in the same order; text is not empty; pictures can be read, and their annotated
    segmentation masks fit them.

    Args:
        entry: The class, or its name in the registry.
        path: Data of this kind, not empty. Required unless the kind takes no path. Text for what is no local path, as
            the name of a data set on the hub; the caller makes sure that it is found.

    Raises:
        AssertionError: A requirement fails. The message names it.
    """
    if isinstance(entry, str):
        assert DATA_SOURCES.get(entry).kind == entry, f"{entry} has the kind {DATA_SOURCES.get(entry).kind}"
        entry = DATA_SOURCES.get(entry)
    _check_description(entry)
    assert (path is None) == (entry.path == "none"), f"{entry.kind}: the kit needs a path exactly if the kind takes one"
    source = entry.named(None if path is None else str(path))
    canonical = entry.kind if path is None else f"{entry.kind}:{path.resolve() if isinstance(path, Path) else path}"
    assert source.name == canonical, f"{source.name}: the canonical name is {canonical}"
    assert parse_source(source.name) == source, f"{source.name}: the canonical name gives another source"
    if entry.path != "none":
        _check_refuses(entry, _NOWHERE)
        _check_refuses(entry, "")
    assert source.is_local or isinstance(path, str), f"{source.name}: data at a path are local"
    source.check()
    digest = source.digest()
    assert source.is_local == (digest is not None), f"{source.name}: local data have a digest, and only these"
    assert json.loads(json.dumps(digest)) == digest, f"{source.name}: the digest is not JSON"
    assert entry.named(None if path is None else str(path)).digest() == digest, f"{source.name}: the digest changes"
    if isinstance(source, TextSource):
        _check_text(source)
    elif isinstance(source, ImageSource):
        _check_images(source)


def _check_description(entry: type[DataSource]) -> None:
    for attribute in ("kind", "title", "help", "contents"):
        value = getattr(entry, attribute, None)
        assert isinstance(value, str), f"{entry.__name__}.{attribute} is missing"
        assert value, f"{entry.__name__}.{attribute} is empty"
        assert value == value.strip(), f"{entry.__name__}.{attribute} is padded: {value!r}"
        assert "\n" not in value, f"{entry.__name__}.{attribute} is more than one line"
    assert ":" not in entry.kind, f"{entry.__name__}.kind holds a colon"
    assert "," not in entry.kind, f"{entry.__name__}.kind holds a comma"
    assert entry.path in ("none", "optional", "required"), f"{entry.__name__}.path is {entry.path!r}"
    assert entry.default_sampling in ("contiguous", "random"), f"{entry.__name__}.default_sampling is unknown"
    assert all(form.partition(":")[0] == entry.kind for form in entry.forms()), f"{entry.__name__}.forms() is wrong"


def _check_refuses(entry: type[DataSource], path: str) -> None:
    try:
        entry.named(path)
    except UsageError:
        return
    raise AssertionError(f"{entry.kind}:{path}: a missing path is not refused")


def _check_text(source: TextSource) -> None:
    for use in ("calibration", "evaluation"):
        documents = list(source.documents(use))
        assert documents == list(source.documents(use)), f"{source.name}: other {use} documents at the next call"
        assert all(isinstance(document, str) for document in documents), f"{source.name}: a document is not a string"
        assert source.text(use).strip(), f"{source.name}: the {use} text is empty"
        bound = source.for_model(None, "none")
        assert bound.name == source.name, f"{source.name}: for a model it has another name"
        assert list(bound.documents(use)) == documents, f"{source.name}: other documents for a model without a template"
        assert source.text(use, 1) == documents[0], f"{source.name}: the first document alone is not its text"


def _check_images(source: ImageSource) -> None:
    records, skipped = source.records()
    again, skipped_again = source.records()
    assert records == again, f"{source.name}: other images, or another order, at the next call"
    assert skipped.reasons == skipped_again.reasons, f"{source.name}: another count of skipped images"
    assert records, f"{source.name}: no image"
    num_masks = 0
    for listed in records:
        record = source.annotated(listed)
        assert record.path == listed.path, f"{record.path}: annotations of another image"
        pixels = read_pixels(record)
        assert pixels.ndim == 3, f"{record.path}: not (height, width, 3)"
        for annotation in record.annotations:
            mask = decode_mask(annotation.segmentation, (pixels.shape[0], pixels.shape[1]))
            assert mask.shape == pixels.shape[:2], f"{record.path}: a segmentation mask of another size"
            num_masks += 1
    assert (num_masks > 0) == source.has_masks, f"{source.name}: has_masks is {source.has_masks}, {num_masks} found"
