"""The steps of a run: what each reads, writes, costs and does."""
