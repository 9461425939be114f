"""docs/models.md says what the census expects."""

from pathlib import Path

import pytest

from tests.census.models_page import models_page

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.long
def test_the_page_is_that_of_the_table():
    assert models_page() == PAGE.read_text(), "it is stale: python -m tests.census > docs/models.md"
