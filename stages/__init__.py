"""What tensors see: calibrate, capture, prune a block, compensate a block, export, evaluate."""
