"""Local copies of WikiText-2, PTB and C4: the rows, and so the tokens, that the hub gives."""

import gzip
import json

import pytest
import torch

from stages.data.c4 import C4
from stages.data.drawing import Drawing
from stages.data.hub_text import HubText
from stages.data.registry import parse_source
from stages.data.tokenization import calibration_tokens, evaluation_tokens
from stages.errors import UsageError
from tests.small_models import tokenizer

TOKENIZER = tokenizer()
COLUMN = {"wikitext2": "text", "ptb": "sentence", "c4": "text"}
# As the hub serves them: WikiText-2 with line ends, blank rows without; PTB stripped; C4 with newlines inside.
ROWS = {
    "wikitext2": ["", " = A title = \n", "", " Two \x85 words .\n", " More .\n"],
    "ptb": ["no it was n't black monday", "but while the <unk> york"],
    "c4": ["One page.\nOf two lines.", "Another\u2028page."],
}
# The plain files that they were made from. C4 never was one; there a line is a document.
PLAIN = {
    "wikitext2": " \n = A title = \n \n Two \x85 words .\n More .\n",
    "ptb": " no it was n't black monday \n but while the <unk> york \n",
}


def write(folder, name, form):
    rows, path = ROWS[name], folder / f"copy.{form}"
    lines = "".join(json.dumps({"other": 1, COLUMN[name]: row}) + "\n" for row in rows)
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({COLUMN[name]: rows}), path)
    elif form == "jsonl":
        path.write_text(lines)
    elif form == "json.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(PLAIN[name], newline="")
    return path


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ROWS for form in ("raw", "jsonl", "json.gz", "parquet") if form != "raw" or name != "c4"],
)
def test_a_local_copy_gives_the_tokens_that_the_hub_gives(tmp_path, monkeypatch, name, form):
    path = write(tmp_path, name, form)
    local = parse_source(f"{name}:copy.{form}")
    assert local.name == f"{name}:{path.resolve()}"
    assert local.is_local
    assert local.digest()["size"] == path.stat().st_size
    local.check()
    monkeypatch.setattr(HubText, "hub_rows", lambda source, use: ROWS[source.kind])
    hub = parse_source(name)
    assert local.documents("evaluation") == ROWS[name]
    assert torch.equal(evaluation_tokens(local, TOKENIZER), evaluation_tokens(hub, TOKENIZER))
    drawn = [calibration_tokens(source, TOKENIZER, Drawing(2, 8, "random")) for source in (local, hub)]
    assert torch.equal(*drawn)
    assert local.max_windows == hub.max_windows


@pytest.mark.parametrize("form", ["json.gz", "parquet"])
def test_what_datasets_reads_is_what_a_copy_gives(tmp_path, monkeypatch, form):
    """The hub's own path through `datasets`, with the hub's file here."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    path = write(tmp_path, "c4", form)
    files = {"calibration": str(path), "evaluation": str(path)}
    monkeypatch.setattr(C4, "files", files)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    assert parse_source("c4").text("evaluation") == parse_source(f"c4:{path}").text("evaluation")


def test_a_copy_of_c4_is_cut_as_c4_is(tmp_path):
    (tmp_path / "c4.txt").write_text("".join(f"{i}\n" for i in range(3000)))
    source = parse_source("c4:c4.txt")
    assert source.text("evaluation").split() == [str(i) for i in range(1100)]
    assert (source.has_documents, source.max_windows) == (True, 256)


@pytest.mark.parametrize(
    ("name", "contents", "complaint"),
    [
        ("x.jsonl", '{"text": "a"}\n{"txet": "b", "id": 1}\n', r"line 2: no text under 'text' \(it has txet, id\)"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', r"line 2: one JSON object a line is expected, and it is no object"),
        ("x.jsonl", '{"text": "a"}\nno json\n', "line 2: no JSON; one object a line"),
        ("x.jsonl", "", "has no text"),
        ("x.raw", " \n \n", "has no text"),
        ("x.parquet", "no parquet", "is no Parquet file"),
        ("x.json.gz", "no gzip", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_copy_is_said(tmp_path, name, contents, complaint):
    (tmp_path / name).write_text(contents)
    with pytest.raises(UsageError, match=complaint):
        parse_source(f"wikitext2:{name}").check()


def test_parquet_without_the_column(tmp_path):
    path = write(tmp_path, "ptb", "parquet")
    with pytest.raises(UsageError, match=r"no column 'text' \(it has sentence\)"):
        parse_source(f"c4:{path}").check()
    with pytest.raises(UsageError, match="no such local file"):
        parse_source("ptb:nowhere.txt")
