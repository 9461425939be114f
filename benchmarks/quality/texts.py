"""The texts that a benchmark calibrates and evaluates on: a short label for the table, and lampctl's name for each."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Resolved, links and all: lampctl names a text by its real path.
DATA = (Path(__file__).resolve().parents[3] / "shared" / "data").resolve()
SHARED = DATA / "text"
EMBEDDED = "pydocs"
# The C4 documents before this one may be calibrated on (and tune.py once looked at them); those from it on are
# reported on, and nothing else.
FIRST_UNSEEN_DOCUMENT = 740
MAIN_CALIBRATION, C4_FIRST = "wikitext2-valid", f"c4-first-{FIRST_UNSEEN_DOCUMENT}"  # labels in the table
_C4 = "c4_prompts.pf-decoding.jsonl"


@dataclass(frozen=True)
class Text:
    """What a column or a row of the table calls a text, and what `lampctl run` calls it."""

    label: str
    source: str


def parse_text(words: str, work: Path) -> Text:
    """[LABEL=]SOURCE, where SOURCE is a file (text or JSON lines) or a name that lampctl knows (pydocs, wikitext2)."""
    label, equals, source = words.rpartition("=")
    path = Path(source.removeprefix("text:"))
    if not path.is_file():
        return Text(label if equals else source, source)
    return Text(label if equals else path.stem, f"text:{as_text_file(path, work)}")


def say_embedded(purpose: str, missing: Path) -> None:
    """Tell loudly that the figures will be of another text than those of the README."""
    print(
        f"NOTE: {missing} is not there: {purpose} on Python's own documentation ({EMBEDDED}) instead. Its figures do "
        "not compare with those of the README; name other files by --calibration and --evaluate, or --data DIR",
        file=sys.stderr,
    )


def default_calibration(texts: Path = SHARED) -> Text:
    """WikiText-2's validation file, or the embedded corpus's own part for calibration."""
    path = texts / "wikitext-2-raw.wiki.valid.raw"
    if path.exists():
        return Text(MAIN_CALIBRATION, f"text:{path}")
    say_embedded("calibration", path)
    return Text(EMBEDDED, EMBEDDED)


def c4_calibration(work: Path, texts: Path = SHARED) -> Text | None:
    """The C4 documents that no result is reported on; None: their file is not there."""
    path = texts / _C4
    if not path.exists():
        return None
    return Text(C4_FIRST, f"text:{as_text_file(path, work, end=FIRST_UNSEEN_DOCUMENT)}")


def default_evaluation(work: Path, texts: Path = SHARED) -> tuple[Text, ...]:
    """WikiText-2's test file and documents of C4, or the embedded corpus's own part for evaluation."""
    wikitext, c4 = texts / "wikitext-2-raw.wiki.test.raw", texts / _C4
    if not wikitext.exists():
        say_embedded("evaluation", wikitext)
        return (Text(EMBEDDED, EMBEDDED),)
    return (
        Text("wikitext2", f"text:{wikitext}"),
        Text("c4", f"text:{as_text_file(c4, work, FIRST_UNSEEN_DOCUMENT)}"),
    )


def as_text_file(path: Path, work: Path, start: int = 0, end: int | None = None) -> Path:
    """`path` itself, or for JSON lines a text file of documents `start` to `end`, joined by blank lines."""
    if path.suffix != ".jsonl":
        return path.resolve()
    documents = []
    for line in path.read_text(encoding="utf-8").splitlines()[start:end]:
        record = json.loads(line)
        documents.append(record["text"] if "text" in record else record["prefix"] + record["gold_completion"])
    which = (f"-from-{start}" if start else "") + (f"-to-{end}" if end is not None else "")
    text = work / f"{path.stem}{which}.txt"
    work.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another call may be reading it.
    unfinished = text.with_suffix(f".{os.getpid()}")
    unfinished.write_text("\n\n".join(documents), encoding="utf-8")
    unfinished.replace(text)
    return text.resolve()
