"""Segment Anything's image encoder as a model that is pruned block by block."""
