"""Where text comes from: data sets of the hub or local copies of them, a text, or Python's own documentation.

A source gives documents. Except in a local file, its text for calibration and its text for evaluation differ. A local
copy of a data set (``wikitext2:PATH``) gives the very rows that the hub serves, joined in the same way.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.data.readers import read_rows, read_text
from stages.errors import ResourceError, UsageError
from stages.formats.file_digest import FileDigest, digest_file, local_path

log = logging.getLogger(__name__)

Use = Literal["calibration", "evaluation"]
EMBEDDED = "pydocs"
# How much of the embedded corpus is for evaluation, in whole topics.
_EVALUATION_SHARE = 0.15


@dataclass(frozen=True)
class _HubText:
    """A data set of the hub: which rows, and how they make one text."""

    repo: str
    column: str
    joint: str
    config: str | None
    split: dict[Use, str]
    from_line: Callable[[str], str]  # the hub's row of a line of the plain text that the data set is made from
    files: dict[Use, str] | None = None
    # As SparseGPT and its followers evaluate: so many documents, and so many windows of them.
    max_documents: int | None = None
    max_windows: int | None = None


_HUB = {
    "wikitext2": _HubText(
        repo="Salesforce/wikitext",
        column="text",
        joint="\n\n",
        config="wikitext-2-raw-v1",
        split={"calibration": "train", "evaluation": "test"},
        from_line=lambda line: f"{line}\n" if line.strip() else "",
    ),
    "ptb": _HubText(
        repo="ptb-text-only/ptb_text_only",
        column="sentence",
        joint=" ",
        config=None,
        split={"calibration": "train", "evaluation": "train"},
        from_line=str.strip,
        # The data set's own loader is a script, which `datasets` no longer runs; its conversion to parquet is data.
        files={
            "calibration": "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/train/*.parquet",
            "evaluation": "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/test/*.parquet",
        },
    ),
    "c4": _HubText(
        repo="allenai/c4",
        column="text",
        joint=" ",
        config=None,
        split={"calibration": "train", "evaluation": "train"},
        from_line=str,
        files={
            "calibration": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
            "evaluation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
        },
        max_documents=1100,
        max_windows=256,
    ),
}
NAMES = (*_HUB, EMBEDDED, "text:PATH", *(f"{name}:PATH" for name in _HUB))


@dataclass(frozen=True)
class Source:
    """A text source that a user named."""

    name: str  # canonical: local paths are absolute
    path: Path | None = None  # of a local file

    task = "language"

    @property
    def kind(self) -> str:
        """What it is, wherever it lies: "wikitext2", "ptb", "c4", "pydocs" or "text"."""
        return self.name.partition(":")[0]

    @property
    def is_local(self) -> bool:
        """Whether it can be read without the hub."""
        return self.name not in _HUB

    @property
    def has_documents(self) -> bool:
        """Whether it is made of documents that have nothing to do with each other (web pages)."""
        return self.kind == "c4"

    @property
    def max_windows(self) -> int | None:
        """How many windows of it the field evaluates on; None: all."""
        return _HUB[self.kind].max_windows if self.kind in _HUB else None

    def check(self) -> None:
        """Raise UsageError or ResourceError unless it can be read. Downloads nothing."""
        if self.path is not None:
            self.documents("evaluation")
        elif self.name in _HUB:
            _check_hub(self.name)

    def digest(self) -> dict[str, str | int] | None:
        """Size and sha256 of what a local or embedded text holds; None for the hub's data sets."""
        if self.path is not None:
            found = digest_file(self.path)
        elif self.name == EMBEDDED:
            text = "\0".join(_topics()).encode()
            found = FileDigest(len(text), hashlib.sha256(text).hexdigest())
        else:
            return None
        return {"size": found.size, "sha256": found.sha256}

    def documents(self, use: Use) -> Sequence[str]:
        """The documents, in their own order. Raises ResourceError if the hub is out of reach."""
        if self.path is not None:
            hub = _HUB.get(self.kind)
            if hub is None:
                return [read_text(self.path, self.name)]
            return read_rows(self.path, self.name, hub.column, hub.from_line)
        if self.name == EMBEDDED:
            return _embedded(use)
        return _hub_rows(self.name, use)

    def text(self, use: Use, num_documents: int | None = None) -> str:
        """The documents (the first so many, if a number is given) as one text, joined as the field joins them."""
        hub, documents = _HUB.get(self.kind), self.documents(use)
        if num_documents is None and hub is not None and use == "evaluation":
            num_documents = hub.max_documents
        first = documents if num_documents is None else documents[:num_documents]
        return (hub.joint if hub is not None else "\n\n").join(first)


def parse_source(name: str) -> Source:
    """The source that `name` names. Raises UsageError for a name that is none, saying which there are."""
    kind, colon, rest = name.partition(":")
    if colon and (kind == "text" or kind in _HUB):
        path = local_path(rest).resolve()
        if not rest or not path.is_file():
            raise UsageError(f"{name}: no such {'text' if kind == 'text' else 'local'} file")
        return Source(f"{kind}:{path}", path)
    if not colon and (name in _HUB or name == EMBEDDED):
        return Source(name)
    hint = f"; for a file, text:{name}" if local_path(name).is_file() else ""
    raise UsageError(f"{name!r} is no text source: choose one of {', '.join(NAMES)}{hint}")


def _topics() -> list[str]:
    """The language reference's topics that every Python carries, about 460 kB in all."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _embedded(use: Use) -> list[str]:
    """The topics for one use: in their order, each goes to evaluation unless that makes its share too large."""
    parts: dict[Use, list[str]] = {"calibration": [], "evaluation": []}
    seen = kept = 0
    for topic in _topics():
        seen += len(topic)
        evaluates = kept + len(topic) <= _EVALUATION_SHARE * seen
        kept += len(topic) if evaluates else 0
        parts["evaluation" if evaluates else "calibration"].append(topic)
    return parts[use]


def _check_hub(name: str) -> None:
    from huggingface_hub import HfApi

    from stages.machine.hub import UNREACHABLE

    try:
        HfApi().dataset_info(_HUB[name].repo, timeout=20)
    except UNREACHABLE as error:
        for use in _HUB[name].split:
            if _cached_rows(name, use) is not None:
                return
        raise _out_of_reach(name, error) from error


def _hub_rows(name: str, use: Use) -> Sequence[str]:
    """Rows of a data set of the hub, or of the cache if the hub is out of reach."""
    from huggingface_hub import HfApi

    from stages.machine.hub import UNREACHABLE

    try:
        # `datasets` itself tries for half a minute before it gives up.
        HfApi().dataset_info(_HUB[name].repo, timeout=20)
        return _load(name, use)
    except UNREACHABLE as error:
        rows = _cached_rows(name, use)
        if rows is None:
            raise _out_of_reach(name, error) from error
        log.warning("the Hugging Face hub is out of reach; using the copy of %s in the cache", name)
        return rows


def _out_of_reach(name: str, error: BaseException) -> ResourceError:
    from stages.machine.hub import reason_of

    return ResourceError(
        f"{name} comes from the Hugging Face hub, which is out of reach ({reason_of(error)}): try later, or use "
        f"pydocs, which comes with Python, or a local copy ({name}:PATH) or text (text:PATH)"
    )


def _cached_rows(name: str, use: Use) -> Sequence[str] | None:
    import datasets

    from stages.machine.hub import UNREACHABLE

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return _load(name, use)
    except UNREACHABLE:
        return None
    except ValueError:  # what `datasets` says of a configuration that is not in its cache
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _load(name: str, use: Use) -> Sequence[str]:
    import datasets

    hub = _HUB[name]
    if hub.files is None:
        rows: Any = datasets.load_dataset(hub.repo, hub.config, split=hub.split[use])
    else:
        kind = "parquet" if hub.files[use].endswith("parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=hub.files[use], split=hub.split[use])
    column: Sequence[str] = rows[hub.column]
    return column
