"""How blocks run on a device: choices, autotuning, the memory planner, the block runner, prefetching."""
