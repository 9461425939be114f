"""Task files for lm-evaluation-harness: its own tasks, with rows that lie on this machine.

Each includes the harness's file of the task and changes where the rows come from, and nothing of the prompts. The
harness takes no relative paths to either, so `render` writes the files with both filled in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from stages.errors import UsageError
from stages.formats.file_digest import digest_file
from stages.machine.cache import cache_dir

# Where a task's rows lie below the folder of the task data; of a pattern, one file may be there.
LAYOUT: Mapping[str, str] = {
    "boolq": "boolq/val.jsonl",
    "rte": "rte/val.jsonl",
    "hellaswag": "hellaswag/val*.jsonl",
    "winogrande": "winogrande/dev.jsonl",
    "arc_easy": "arc_easy/ARC-Easy-Test.jsonl",
    "arc_challenge": "arc_challenge/ARC-Challenge-Test.jsonl",
    "openbookqa": "openbookqa/test.jsonl",
}
# What `datasets` takes for a pattern in a path.
_PATTERN_LETTERS = "*?[]"


@dataclass(frozen=True)
class TaskData:
    """A folder with the rows of tasks, laid out as `LAYOUT` says."""

    folder: Path  # absolute

    @classmethod
    def at(cls, folder: str | Path) -> TaskData:
        """The task data in `folder`. Raises UsageError if there is none, or none that `datasets` can be told of."""
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise UsageError(f"--task-data {folder}: no such folder")
        if set(str(path)) & set(_PATTERN_LETTERS):
            raise UsageError(
                f"--task-data {path}: `datasets` takes {' '.join(_PATTERN_LETTERS)} in a path for a pattern; use a "
                "link with a plain name"
            )
        found = cls(path)
        if not any(found._candidates(task) for task in LAYOUT):
            raise UsageError(f"--task-data {folder} holds rows of no task; {_expected(*LAYOUT)}")
        return found

    def rows(self, task: str) -> Path:
        """The file with the rows of a task. Raises UsageError if there is none, or more than one that could be it."""
        if task not in LAYOUT:
            raise UsageError(
                f"{task} has no local form: --task-data serves {', '.join(LAYOUT)}; leave it out to take "
                f"{task} from the hub"
            )
        found = self._candidates(task)
        if len(found) != 1:
            what = "no rows" if not found else f"{len(found)} files with rows ({', '.join(p.name for p in found)})"
            raise UsageError(f"--task-data {self.folder} has {what} of {task}; {_expected(task)}")
        return found[0]

    def digest(self, task: str) -> dict[str, str | int]:
        """Size and sha256 of the rows of a task."""
        found = digest_file(self.rows(task))
        return {"size": found.size, "sha256": found.sha256}

    def _candidates(self, task: str) -> list[Path]:
        return sorted(path for path in self.folder.glob(LAYOUT[task]) if path.is_file())


def render(data: TaskData) -> Path:
    """A folder for the harness's ``--include_path``, with a file for every task whose rows `data` has.

    It lies in the cache, named by what is in it. Raises UsageError if the harness is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UsageError(MISSING_HARNESS)
    harness = Path(spec.origin).parent / "tasks"
    files = {
        f"{task}.yaml": Template((Path(__file__).parent / f"{task}.yaml").read_text(encoding="utf-8")).substitute(
            harness=_quoted(harness), rows=_quoted(data.rows(task))
        )
        for task in LAYOUT
        if len(data._candidates(task)) == 1
    }
    name = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "tasks" / name
    folder.mkdir(parents=True, exist_ok=True)
    for filename, contents in files.items():
        if not (folder / filename).exists():
            temporary = folder / f".{filename}"
            temporary.write_text(contents, encoding="utf-8")
            temporary.rename(folder / filename)
    return folder


MISSING_HARNESS = (
    "zero-shot tasks are measured by lm-evaluation-harness, which is not installed: pip install '.[eval]' in the clone "
    "of lampctl, or pip install lm-eval"
)


def _quoted(path: Path) -> str:
    """A path for between the double quotes of YAML, which understands JSON's escapes."""
    return json.dumps(str(path))[1:-1]


def _expected(*tasks: str) -> str:
    return "expected: " + ", ".join(LAYOUT[task] for task in tasks)
