"""docs/models.md says what the census expects."""

from pathlib import Path

import pytest

from tests.census.families import CENSUS, ONE_OF_EACH
from tests.census.models_page import models_page, row_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
STALE = "it is stale: python -m tests.census > docs/models.md"


@pytest.mark.long
def test_the_page_has_a_line_of_every_family_and_those_of_one_of_each_kind_are_right():
    lines = [line for line in PAGE.read_text().splitlines(keepends=True) if line.startswith("| ")]
    by_name = {line.split(" | ")[0].removeprefix("| "): line for line in lines[1:]}
    words = {name: line.split(" | ")[2] for name, line in by_name.items()}
    assert words == {entry.name: entry.verdict.word for entry in CENSUS}, STALE
    for entry in CENSUS:
        if entry.name in ONE_OF_EACH:
            assert by_name[entry.name] == row_of(entry), STALE


@pytest.mark.slow
def test_the_page_is_that_of_the_table():
    assert models_page() == PAGE.read_text(), STALE
