"""Copies of the golden run's records, cut off after some commits: a run without payloads, opened in milliseconds."""

import json
import shutil
from pathlib import Path

from pipeline.rundir import records

GOLDEN = Path(__file__).parents[2] / "golden"


def copy_of_golden(place: Path, num_commits: int | None = None, schema: int = 2) -> Path:
    """The records of the golden run with its first `num_commits` commits; None: all of them."""
    shutil.copytree(GOLDEN / f"schema-{schema}" / "records", place)
    for path in sorted((place / "commits").iterdir())[num_commits:] if num_commits is not None else []:
        path.unlink()
    return place


def change_newest(place: Path, **fields) -> None:
    """Change fields of the newest commit, and sign it again."""
    path = sorted((place / "commits").iterdir())[-1]
    body = {**json.loads(path.read_text()), **fields}
    del body["digest"]
    path.write_bytes(records._file_bytes({**body, "digest": records._digest(body)}))
