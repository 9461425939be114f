"""The cost of durability: what flushes, digests and commits add to the time of a run."""
