"""A few rows of every zero-shot task, as the hub serves them and as the files of `--task-data` have them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SPEC = find_spec("lm_eval")
_TASKS = Path(_SPEC.origin or "").parent / "tasks" if _SPEC is not None else Path()
# The harness's own file of each task, and the split that it evaluates on.
STOCK = {
    "boolq": (_TASKS / "super_glue/boolq/default.yaml", "validation"),
    "rte": (_TASKS / "glue/rte/default.yaml", "validation"),
    "hellaswag": (_TASKS / "hellaswag/hellaswag.yaml", "validation"),
    "winogrande": (_TASKS / "winogrande/default.yaml", "validation"),
    "arc_easy": (_TASKS / "arc/arc_easy.yaml", "test"),
    "arc_challenge": (_TASKS / "arc/arc_challenge.yaml", "test"),
    "openbookqa": (_TASKS / "openbookqa/openbookqa.yaml", "test"),
}
_ARC = [
    ("Which burns?", ["ice", "wood", "salt", "sand"], "ABCD", "B"),
    ("Which falls?", ["rain", "light", "smoke", "fog"], "1234", "1"),
    ("Which shines?", ["stone", "mud", "the Sun"], "ABC", "C"),
]
_ARC_HUB = [
    {"id": f"q{i}", "question": q, "choices": {"text": texts, "label": list(labels)}, "answerKey": key}
    for i, (q, texts, labels, key) in enumerate(_ARC)
]
_ARC_FILE = [
    {
        "id": f"q{i}",
        "question": {
            "stem": q,
            "choices": [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)],
        },
        "answerKey": key,
    }
    for i, (q, texts, labels, key) in enumerate(_ARC)
]
_WINOGRANDE = [
    {"sentence": "The cup broke, since the _ fell.", "option1": "cup", "option2": "floor", "answer": "1"},
    {"sentence": "Ann thanked Bea, for _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
]
HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": "is ice cold", "passage": "Ice -- Ice is frozen water.", "idx": 0, "label": 1},
        {"question": "is fire cold", "passage": "Fire -- Fire is hot.", "idx": 1, "label": 0},
    ],
    "rte": [
        {"sentence1": "A cat sleeps.", "sentence2": "An animal sleeps.", "label": 0, "idx": 0},
        {"sentence1": "A cat sleeps.", "sentence2": "A dog sleeps.", "label": 1, "idx": 1},
    ],
    "hellaswag": [
        {
            "ind": 4,
            "activity_label": "Knitting",
            "ctx_a": "A woman sits on a chair.",
            "ctx_b": "she",
            "ctx": "A woman sits on a chair. she",
            "endings": ["knits a hat.", "flies away.", "eats the chair.", "melts."],
            "label": "0",
        },
        {
            # WikiHow: what the harness leaves of the brackets has a space in front, which belongs to the prompt.
            "ind": 9,
            "activity_label": "Home",
            "ctx_a": "[header] How to boil water [title] Take a pot.",
            "ctx_b": "",
            "ctx": "[header] How to boil water [title] Take a pot.",
            "endings": [
                "[step] Fill it  up.",
                "[step] Eat it [substeps] now.",
                "Throw it [title] away.",
                "[step] Wait.",
            ],
            "label": "3",
        },
    ],
    "winogrande": _WINOGRANDE,
    "arc_easy": _ARC_HUB,
    "arc_challenge": _ARC_HUB,
    "openbookqa": [
        {"id": "1", "question_stem": "The sky is", "choices": _ARC_HUB[0]["choices"], "answerKey": "D"},
        {"id": "2", "question_stem": "Question: what\nAnswer: is", "choices": _ARC_HUB[0]["choices"], "answerKey": "A"},
    ],
}
_FILES: dict[str, list[dict[str, Any]]] = {
    "boolq/val.jsonl": [{**row, "label": ["false", "true"][row["label"]]} for row in HUB_ROWS["boolq"]],
    "rte/val.jsonl": [
        {
            "premise": row["sentence1"],
            "hypothesis": row["sentence2"],
            "label": ["entailment", "not_entailment"][row["label"]],
            "idx": row["idx"],
        }
        for row in HUB_ROWS["rte"]
    ],
    "hellaswag/val1000.jsonl": [
        {
            "ind": 4,
            "query": "Knitting: A woman sits on a chair. She",
            "choices": ["knits a hat.", "flies away.", "eats the chair.", "melts."],
            "gold": 0,
        },
        {
            "ind": 9,
            "query": "Home: How to boil water. Take a pot.",
            "choices": [" Fill it up.", " Eat it now.", "Throw it. away.", " Wait."],
            "gold": 3,
        },
    ],
    "winogrande/dev.jsonl": _WINOGRANDE,
    "arc_easy/ARC-Easy-Test.jsonl": _ARC_FILE,
    "arc_challenge/ARC-Challenge-Test.jsonl": _ARC_FILE,
    "openbookqa/test.jsonl": [
        {
            "id": row["id"],
            "query": f"Question: {row['question_stem']}\nAnswer:",
            "choices": row["choices"]["text"],
            "gold": "ABCD".index(row["answerKey"]),
        }
        for row in HUB_ROWS["openbookqa"]
    ],
}


def write_rows(folder: Path) -> Path:
    """A folder for `--task-data`."""
    for name, rows in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
