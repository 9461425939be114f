"""Every kind of data source: it passes the conformance kit, is found by name, and can come from another package."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from stages.data.registry import DATA_SOURCES, parse_source, source_forms, source_kind
from stages.data.text_source import TextSource
from stages.errors import UsageError
from stages.tasks.language import Language
from stages.testing.data import check_data_source
from tests import hub
from tests.small_sam import coco, sa1b


def data_for(kind, folder):
    """Data of a kind in `folder`."""
    if DATA_SOURCES.get(kind).path == "none":
        return None
    if kind in ("coco", "images"):
        made = coco(folder / "coco", 3)
        return made if kind == "coco" else made / "images"
    if kind == "sa1b":
        return sa1b(folder / "sa1b", 3)
    if kind == "hf":
        return "someone/something"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ["A line.", "Another one."]}), folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text('{"text": "A line."}\n{"text": "Another one."}\n')
        return folder / "rows.jsonl"
    path = folder / "text.txt"
    path.write_text("A line.\n\nAnother one.\n")
    return path


@pytest.mark.parametrize("kind", DATA_SOURCES.names)
def test_every_kind_passes_the_kit(tmp_path, kind, monkeypatch):
    hub.serve(monkeypatch, {"someone/something": {"train": {"text": ["A line."]}, "test": {"text": ["Another."]}}})
    check_data_source(kind, data_for(kind, tmp_path))


@dataclass(frozen=True)
class Poems(TextSource):
    kind = "poems"
    title = "poems"
    help = "Poems that come with the package."
    has_documents = True
    default_sampling = "random"

    @classmethod
    def named(cls, path):
        return cls(cls.kind)

    @property
    def is_local(self):
        return True

    def check(self):
        return

    def digest(self):
        return {"size": 3}

    def documents(self, use):
        return [f"poem {number} for {use}" for number in range(3)]


@pytest.fixture
def poems():
    DATA_SOURCES.register("poems", Poems)
    yield
    DATA_SOURCES.unregister("poems")


def test_a_source_of_another_package_is_used_by_its_name(poems):
    check_data_source("poems")
    assert parse_source("poems").text("evaluation", 1) == "poem 0 for evaluation"
    assert "poems" in source_forms()
    assert Language().default_sampling("poems") == "random"  # the source decides, not its name
    with pytest.raises(UsageError, match=r"'poems:x' is not a data source: choose one of .*poems"):
        parse_source("poems:x")


def test_the_kit_sees_a_source_that_changes(poems, monkeypatch):
    calls = []
    monkeypatch.setattr(Poems, "documents", lambda self, use: calls.append(use) or [f"poem {len(calls)}"])
    with pytest.raises(AssertionError, match="other calibration documents at the next call"):
        check_data_source("poems")


def test_forms_say_how_a_source_is_written():
    text = "c4 c4:PATH wikitext2 wikitext2:PATH ptb ptb:PATH pydocs text:PATH jsonl:FILE parquet:FILE hf:REPO"
    assert [form for form in source_forms() if not form.endswith(":DIR")] == text.split()
    assert [form for form in source_forms() if form.endswith(":DIR")] == ["sa1b:DIR", "coco:DIR", "images:DIR"]
    assert source_kind("c4:gone.txt").kind == "c4"
    assert source_kind("gone") is None
