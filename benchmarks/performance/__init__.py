"""Speed and memory of runs and kernels, on a processor and on a GPU."""
