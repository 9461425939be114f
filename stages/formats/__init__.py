"""Files: safetensors, checkpoints, pruning masks, packed models."""
