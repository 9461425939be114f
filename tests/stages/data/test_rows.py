"""Data sources whose documents are rows: JSON lines, Parquet, the hub; compression, conversations, errors."""

import bz2
import gzip
import json
import lzma
import struct
from urllib.parse import quote

import pyarrow
import pytest
import torch
from pyarrow import parquet

from stages.calibrate import draw_tokens
from stages.data.drawing import Drawing
from stages.data.registry import parse_source
from stages.errors import ResourceError, UsageError
from tests import hub
from tests.small_models import save, tokenizer

ROWS = [{"id": 1, "text": "One\r\nrow.", "more": "M1"}, {"id": 2, "text": "Two \u2028 r\u00f6ws.", "more": "M2"}]
CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]},
]
USER = {"role": "user", "content": "Hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
SHAREGPT = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write(path, data):
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](data))
    return path


def parquet_bytes(rows):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def with_template(template=TEMPLATE):
    made = tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_every_kind_of_file_is_unpacked_by_its_ending(tmp_path, kind, packed):
    data = {"jsonl": lines(ROWS), "parquet": parquet_bytes(ROWS), "text": b"One\r\nrow."}[kind]
    path = write(tmp_path / f"data.{ {'text': 'txt'}.get(kind, kind) }{packed}", data)
    source = parse_source(f"{kind}:{path}")
    source.check()
    assert list(source.documents("calibration")) == ([r["text"] for r in ROWS] if kind != "text" else ["One\r\nrow."])
    assert source.digest()["size"] == path.stat().st_size


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_column_is_named_or_found(tmp_path, kind):
    make = {"jsonl": lines, "parquet": parquet_bytes}[kind]
    path = write(tmp_path / f"rows.{kind}", make(ROWS))
    named = parse_source(f"{kind}:rows.{kind}?column=more")
    assert named.name == f"{kind}:{path}?column=more"
    assert parse_source(named.name) == named
    assert named.text("evaluation") == "M1\n\nM2"
    write(path, make([{"id": 1, "story": "S"}]))
    assert parse_source(f"{kind}:rows.{kind}").text("evaluation") == "S"
    write(path, make([{"a": "x", "b": "y"}]))
    with pytest.raises(UsageError, match=r"no column 'text', 'messages' or 'conversations'.*\?column=.* one of a, b"):
        parse_source(f"{kind}:rows.{kind}").check()
    with pytest.raises(UsageError, match=rf"rows\.{kind}\?column=c has no column 'c'.* one of a, b"):
        parse_source(f"{kind}:rows.{kind}?column=c").check()
    with pytest.raises(UsageError, match=rf"split=train is not understood; write {kind}:rows.{kind}\?column=NAME"):
        parse_source(f"{kind}:rows.{kind}?split=train")
    with pytest.raises(UsageError, match="no such local file"):
        parse_source(f"{kind}:nowhere?column=c")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "c4"])
def test_a_folder_and_a_pattern_are_named_as_such(tmp_path, kind):
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(2):
        write(folder / f"{number}.jsonl", lines(ROWS))
    with pytest.raises(UsageError, match=rf"^{kind}:d is a folder, and one file is read: name a file in it$"):
        parse_source(f"{kind}:d")
    with pytest.raises(UsageError, match=r":d/\*.jsonl is a pattern, and one file is read: name one of the 2 that it"):
        parse_source(f"{kind}:d/*.jsonl")
    with pytest.raises(UsageError, match=r"no such (text|local) file"):
        parse_source(f"{kind}:d/*.csv")


def test_a_question_mark_in_a_file_name(tmp_path):
    write(tmp_path / "what?.jsonl", lines(ROWS))
    assert parse_source("jsonl:what?.jsonl").text("evaluation").startswith("One")


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne\r\ntwo\xef\xbb\xbf")
    assert parse_source("text:a.txt").text("calibration") == "One\r\ntwo\ufeff"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ROWS))
    assert parse_source("jsonl:a.jsonl").text("calibration", 1) == "One\r\nrow."


def test_a_file_without_its_kind_in_front_gets_the_hint(tmp_path):
    write(tmp_path / "a.jsonl.gz", lines(ROWS))
    with pytest.raises(UsageError, match=r"for a file, jsonl:a\.jsonl\.gz"):
        parse_source("a.jsonl.gz")


def test_a_list_of_objects_is_read_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert parse_source("jsonl:a.json?column=more").text("calibration") == "M1\n\nM2"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("chat.jsonl", "write jsonl:chat.jsonl"),
        ("chat.jsonl.zst", "write jsonl:chat.jsonl.zst"),
        ("rows.json.gz", "write jsonl:rows.json.gz"),
        ("rows.parquet", "write parquet:rows.parquet"),
    ],
)
def test_text_is_not_read_from_another_kind_of_file(tmp_path, name, remedy):
    write(tmp_path / name, lines(ROWS))
    with pytest.raises(UsageError, match=remedy):
        parse_source(f"text:{name}")


@pytest.mark.parametrize(
    ("data", "about"),
    [
        (zstd(b"text"), "compressed by zstd; give it the ending .zst"),
        (gzip.compress(b"text", mtime=0), "compressed by gzip; give it the ending .gz"),
        (parquet_bytes(ROWS), "it is Parquet; write parquet:FILE"),
        ("text".encode("utf-16"), "it is UTF-16"),
        (b"caf\xe9", r"no UTF-8 text \(byte 3\): convert it"),
    ],
)
def test_what_is_no_text_says_what_it_is(tmp_path, data, about):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UsageError, match=about):
        parse_source("text:a.txt").check()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"text": "a"}, {"txet": "b"}], r"line 2: no text under 'text' \(it has txet\)"),
        ([{"text": "a"}, {"text": None}], "line 2, column 'text' holds null, .* correct or remove this line$"),
        (
            [{"text": 3, "n": 1, "body": "b"}],
            r"line 1, column 'text' holds a number, .*write \?column= and one of body$",
        ),
        ([{"n": 1}], "no column 'text', 'messages' or 'conversations' and no other column of text or conversations$"),
        ([{"messages": [1]}], "line 1, column 'messages' holds a list that begins with a number, neither text nor a"),
        ([{"messages": []}], "has no text in column 'messages'$"),
        (
            [{"messages": [USER, {"role": "assistant", "content": None}]}],
            r"message 2 \(assistant\) has no content and no",
        ),
        ([{"messages": [USER, {"content": "Hi"}]}], r"message 2 has no role \(it has content\)"),
        ([{"messages": [USER | {"content": 3}]}], r"message 1 \(user\) holds a number, not text"),
        ([{"messages": [USER | {"content": [3]}]}], r"message 1 \(user\) has a part that is a number"),
        (
            [{"messages": [USER]}, {"messages": [USER | {"content": [{"type": "image"}]}]}],
            r"line 2, column 'messages': message 1 \(user\) has a part of type 'image', and text alone",
        ),
        ([{"text": ""}], r"has no text in column 'text'"),
        ([], "has no rows"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path, rows, complaint):
    write(tmp_path / "a.jsonl", lines(rows))
    with pytest.raises(UsageError, match=complaint):
        parse_source("jsonl:a.jsonl").check()


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_archives_are_said_to_be(tmp_path, packed):
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACK[packed](lines(ROWS))[:-9] + b"123456789")
    with pytest.raises(UsageError, match=r"jsonl:.*a\.jsonl.* cannot be read"):
        parse_source(f"jsonl:a.jsonl{packed}").check()


@pytest.mark.parametrize(("rows", "num"), [(CHAT, 2), (SHAREGPT, 1)])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_go_through_the_chat_template(tmp_path, kind, rows, num):
    if kind == "parquet" and rows is CHAT:
        rows = rows[:1]  # a column of Parquet has one type
        num = 1
    write(tmp_path / f"chat.{kind}", {"jsonl": lines, "parquet": parquet_bytes}[kind](rows))
    source = parse_source(f"{kind}:chat.{kind}")
    source.check()
    rendered = ["[user]Hi[assistant]Hello!", "[user]2+2?"][:num]
    assert source.for_model(with_template(), "auto").documents("calibration") == rendered
    assert source.for_model(with_template(), "none").documents("calibration") == ["Hi\n\nHello!", "2+2?"][:num]


@pytest.mark.parametrize("call", [CALL, {key: value for key, value in CALL.items() if key != "content"}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tool_calls_go_to_the_chat_template_as_they_are(tmp_path, kind, call):
    """Rows of Parquet have every key: what is null in a message is absent."""
    rows = [{"messages": [USER, call, {"role": "tool", "content": "3"}]}]
    write(tmp_path / f"chat.{kind}", {"jsonl": lines, "parquet": parquet_bytes}[kind](rows))
    source = parse_source(f"{kind}:chat.{kind}")
    source.check()
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls is defined %}{{ m.tool_calls[0].function | tojson }}"
        "{{ m.content or 0 }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    written = '[user]Hi[assistant]{"name": "add", "arguments": {"a": 1}}0[tool]3'
    assert source.for_model(with_template(template), "auto").documents("calibration") == [written]
    # A template without tool calls may add null to text, which is an error.
    assert source.for_model(with_template(), "auto").documents("calibration") == ["[user]Hi[assistant][tool]3"]
    assert source.for_model(with_template(), "none").documents("calibration") == ["Hi\n\n3"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_without_messages_are_passed_over_and_counted(tmp_path, kind):
    write(tmp_path / f"chat.{kind}", {"jsonl": lines, "parquet": parquet_bytes}[kind]([{"messages": []}, *CHAT[:1]]))
    source = parse_source(f"{kind}:chat.{kind}")
    assert source.documents("calibration") == ["Hi\n\nHello!"]
    assert source.skipped("calibration") == {"conversations without messages": 1}


def test_samples_are_tokens_of_the_rendered_conversations(tmp_path):
    write(tmp_path / "chat.jsonl", lines(CHAT * 3))
    made = with_template()
    expected = torch.tensor(made("\n\n".join(["[user]Hi[assistant]Hello!", "[user]2+2?"] * 3))["input_ids"])
    drawn = draw_tokens(parse_source("jsonl:chat.jsonl"), made, Drawing(2, 20, "contiguous", 0, 0))
    assert torch.equal(drawn.flatten(), expected[:40])
    alone = draw_tokens(parse_source("jsonl:chat.jsonl"), made, Drawing(1, 6, "contiguous", 0, 0, "stream", "none"))
    assert torch.equal(alone[0], torch.tensor(made("Hi\n\nHe")["input_ids"]))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "the model's tokenizer has no chat template; --chat-template none"),
        ("{{ raise_exception('roles must alternate') }}", r"refuses it \(roles must alternate\); --chat-template none"),
    ],
)
def test_a_conversation_that_cannot_be_rendered(tmp_path, template, complaint):
    write(tmp_path / "chat.jsonl", lines(CHAT))
    with pytest.raises(UsageError, match=rf"jsonl:.*chat\.jsonl, line 1, column 'messages': .*{complaint}"):
        parse_source("jsonl:chat.jsonl").for_model(with_template(template), "auto").documents("calibration")


def test_the_hub(monkeypatch):
    table = {"text": ["a", "b"], "other": ["x", "y"]}
    calls = hub.serve(monkeypatch, {"me/it": {"train": table, "validation": {"text": ["v"]}}})
    source = parse_source("hf:me/it")
    source.check()
    assert (source.text("calibration"), source.text("evaluation")) == ("a\n\nb", "v")
    assert [call[2] for call in calls] == ["train", "validation"]
    named = parse_source("hf:me/it?split=train&column=other&config=en")
    assert named.name == "hf:me/it?config=en&split=train&column=other"
    assert parse_source(named.name) == named
    assert named.text("evaluation") == "x\n\ny"
    assert calls[-1] == ("me/it", "en", "train")
    with pytest.raises(
        UsageError, match=r"hf:me/it\?column=c has no column 'c': write \?column= and one of text, other"
    ):
        parse_source("hf:me/it?column=c").text("calibration")
    with pytest.raises(
        UsageError, match=r"Unknown split \"tets\". Should be one of .*hf:me/it\?config=NAME&split=NAME"
    ):
        parse_source("hf:me/it?split=tets").text("calibration")
    with pytest.raises(UsageError, match="has no data set me/other"):
        parse_source("hf:me/other").check()
    for wrong in ("hf:", "hf:./folder", "hf:a/b/c"):
        with pytest.raises(UsageError, match="write hf:OWNER/NAME"):
            parse_source(wrong)


def test_the_hub_out_of_reach_names_the_local_alternatives(monkeypatch):
    hub.refuse(monkeypatch)
    for act in (lambda source: source.check(), lambda source: source.text("calibration")):
        with pytest.raises(ResourceError, match=r"hf:me/it comes from .* hub.*no route.*parquet:it\.parquet, jsonl:"):
            act(parse_source("hf:me/it"))


@pytest.mark.parametrize("column", ["C++", "50%", "a%20b", "R&D", "a b", "a=b", "what?", "\u00fc#;"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_any_name_is_named_and_named_again(tmp_path, kind, column):
    row = {column: "mine", "text": "other"}
    path = tmp_path / f"a?b.{kind}"
    path.write_bytes(lines([row]) if kind == "jsonl" else parquet_bytes([row]))
    found = parse_source(f"{kind}:{path}?column={quote(column)}")
    assert (found.column, found.documents("evaluation")) == (column, ["mine"])
    assert parse_source(found.name) == found, "a resumed run parses the name that it recorded"


HALF = json.dumps(
    {"text": "whole \ud83d\ude00, half \ud83d.", "more": "fine", "chat": [{"role": "user", "content": "\udc00"}]}
)


@pytest.mark.parametrize("column", ["text", "chat"])
@pytest.mark.parametrize("form", ["{}\n{}\n", "[{}, {}]"])
def test_half_of_a_character_in_json_is_no_text(lampctl, tmp_path, form, column):
    path = write(tmp_path / "a.jsonl", form.format(json.dumps({"text": "x", "chat": [USER]}), HALF).encode())
    source = parse_source(f"jsonl:{path}?column={column}")
    with pytest.raises(UsageError, match=rf"(line|entry) 2, column '{column}' holds half of a character"):
        source.check()
    save(tmp_path / "m", "llama")
    flags = ("--sparsity", "0.5", "--method", "wanda", "--evaluate", "", "--run-dir", "r", "--calibration")
    assert lampctl("run", "m", *flags, source.name).code == 2


def test_half_of_a_character_in_another_column_does_not_matter(tmp_path):
    path = write(tmp_path / "a.jsonl", HALF.encode())
    assert parse_source(f"jsonl:{path}?column=more").documents("evaluation") == ["fine"]


def odd_parquet(path):
    """Columns that Arrow holds and Python cannot: bytes that are no UTF-8, times beyond the year 9999."""
    offsets, data = struct.pack("<3i", 0, 1, 4), b"a\xff\xfea"
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)])
    times = pyarrow.array([2**62, 2**62], pyarrow.timestamp("us"))
    columns = {"bytes": text, "times": times, "body": pyarrow.array(["One.", "Two."])}
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(("column", "row"), [("bytes", 2), ("times", 1)])
def test_values_of_parquet_that_cannot_be_read_are_named(tmp_path, column, row):
    path = odd_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=rf"row {row}, column '{column}' holds a value of type .* that cannot be read"):
        parse_source(f"parquet:{path}?column={column}").check()


def test_columns_of_parquet_that_cannot_be_read_do_not_hide_the_text(tmp_path):
    path = odd_parquet(tmp_path / "a.parquet")
    assert parse_source(f"parquet:{path}?column=body").documents("evaluation") == ["One.", "Two."]
    with pytest.raises(UsageError, match=r"one of bytes, body"):  # the first value of "bytes" is text
        parse_source(f"parquet:{path}").check()
