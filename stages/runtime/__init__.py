"""How blocks run: the block runner, prefetching, the memory planner."""
