"""Where a run lives: one small interface (`base`), a folder on a disk (`folder`) behind it."""
