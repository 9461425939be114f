"""`python -m tests.census > docs/models.md`."""

from tests.census.models_page import models_page

print(models_page(), end="")
