"""Walk a plan of steps: run, stop, repair, verify. Knows steps, not pruning."""
