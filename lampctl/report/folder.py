"""The folder of a report: the page, and its figures as files. A report written over an older one replaces its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from lampctl.report.page import FILES, GENERATOR, Picture
from pipeline.errors import ConfigError
from pipeline.rundir.storage.locate import is_address

PAGE = "index.html"
_FIGURES = "figures"
_SUFFIXES = (".png", ".csv")  # of all files beside the page


def files_of(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """The files of these pictures: their contents by their path in the folder."""
    files = {}
    for picture in pictures:
        files[f"{_FIGURES}/{picture.name}.png"] = picture.png
        if picture.csv is not None:
            files[f"{_FIGURES}/{picture.name}.csv"] = picture.csv.encode()
    return files


def write_folder(out: Path, files: Mapping[str, bytes], render: Callable[[Sequence[str]], str]) -> list[Path]:
    """Write a report, and delete what an earlier report in this folder wrote and this one does not.

    Args:
        out: The folder; `require_ours` has accepted it.
        files: Contents by their path in the folder.
        render: Gives the page, which names these files.

    Returns:
        The written files, the page first.
    """
    for name in _written_before(out):
        if name not in files:
            (out / name).unlink(missing_ok=True)
    for name, contents in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(contents)
    (out / _FIGURES).mkdir(parents=True, exist_ok=True)
    # The page comes last: until then, the earlier page names the files that may have to be deleted.
    (out / PAGE).write_text(render(tuple(files)), encoding="utf-8")
    return [out / PAGE, *(out / name for name in files)]


def require_ours(out: Path, places: Sequence[str]) -> None:
    """Raise ConfigError unless `out` is missing, empty, or an earlier report."""
    for place in places:
        if not is_address(place) and out.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError(f"--out {out} is inside the run {place}: name another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    try:
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        if is_new:
            out.rmdir()  # this was only a test whether it can be created
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be created: {error.strerror}") from error
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        is_ours = f'content="{GENERATOR}"' in (out / PAGE).read_text(encoding="utf-8", errors="replace")[:1000]
    except FileNotFoundError:
        is_ours = False
    if not is_ours:
        raise ConfigError(f"--out {out} holds files that are not a report: name a new folder")


def _written_before(out: Path) -> list[str]:
    """The files beside the page that the earlier report in this folder names as its own."""
    page = out / PAGE
    if not page.is_file():
        return []
    reader = _FilesReader()
    reader.feed(page.read_text(encoding="utf-8", errors="replace"))
    return [name for name in reader.files if _is_beside(name)]


def _is_beside(name: str) -> bool:
    """Whether a path stays in the folder and has the form of a file of a report. The page may have been edited."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.suffix in _SUFFIXES


class _FilesReader(HTMLParser):
    """Reads the names of a report's files from its page."""

    def __init__(self) -> None:
        super().__init__()
        self.files: tuple[str, ...] = ()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the list in ``<meta name="FILES">``."""
        found = dict(attrs)
        if tag == "meta" and found.get("name") == FILES:
            names = json.loads(found.get("content") or "[]")
            self.files = tuple(str(name) for name in names)
