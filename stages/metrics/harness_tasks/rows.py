"""Rows as their authors publish them, in the columns that the hub gives them. The harness's task files call these.

Rows that already are in the hub's form stay as they are. A label that is none is an error: it would only show as a
wrong accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.errors import UsageError

Row = dict[str, Any]
_BOOLEANS = {"true": 1, "false": 0, "1": 1, "0": 0}
_ENTAILMENT = {"entailment": 0, "not_entailment": 1}


def boolq(dataset: Any) -> Any:
    """BoolQ: labels as numbers (the files have true and false)."""
    return dataset.map(_boolq, remove_columns=dataset.column_names)


def rte(dataset: Any) -> Any:
    """RTE: SuperGLUE's names of columns and labels become GLUE's."""
    return _renamed(dataset, "premise", _rte)


def arc(dataset: Any) -> Any:
    """ARC, both sets: the question and its choices side by side, choices as one list of texts and one of labels."""
    return _renamed(dataset, None if "choices" in dataset.column_names else "question", _arc)


def hellaswag(dataset: Any) -> Any:
    """HellaSwag: raw rows go through the harness's own cleaning; rows that have been through it are only renamed.

    They must not go through it again: it leaves a space in front of WikiHow's endings, and would then remove it.
    """
    if "query" not in dataset.column_names:
        from lm_eval.tasks.hellaswag.utils import process_docs

        return process_docs(dataset)
    return _renamed(dataset, "gold", _hellaswag)


def openbookqa(dataset: Any) -> Any:
    """OpenBookQA: rows that are written as a prompt become question, choices and answer again."""
    return _renamed(dataset, "query", _openbookqa)


def _renamed(dataset: Any, sign: str | None, rename: Callable[[Row], Row]) -> Any:
    """The rows renamed, if they have the column that tells the other form."""
    if sign not in dataset.column_names:
        return dataset
    return dataset.map(rename, remove_columns=dataset.column_names)


def _boolq(row: Row) -> Row:
    return {
        "question": row["question"],
        "passage": row["passage"],
        "label": _label("boolq", _BOOLEANS, str(row["label"]).lower()),
    }


def _rte(row: Row) -> Row:
    return {
        "sentence1": row["premise"],
        "sentence2": row["hypothesis"],
        "label": _label("rte", _ENTAILMENT, row["label"]),
    }


def _arc(row: Row) -> Row:
    choices = row["question"]["choices"]
    return {
        "id": row["id"],
        "question": row["question"]["stem"],
        "choices": {"text": [choice["text"] for choice in choices], "label": [choice["label"] for choice in choices]},
        "answerKey": row["answerKey"],
    }


def _hellaswag(row: Row) -> Row:
    return {"query": row["query"], "choices": row["choices"], "label": str(row["gold"])}


def _openbookqa(row: Row) -> Row:
    labels = "ABCDEFGH"[: len(row["choices"])]
    return {
        "id": row["id"],
        "question_stem": row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": row["choices"], "label": list(labels)},
        "answerKey": labels[row["gold"]],
    }


def _label(task: str, numbers: dict[str, int], label: Any) -> int:
    if label not in numbers:
        raise UsageError(f"a row of {task} has the label {label!r}: one of {', '.join(numbers)} is expected")
    return numbers[label]
