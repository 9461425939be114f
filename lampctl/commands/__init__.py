"""One module per command. Heavy imports are inside the functions: `--help` must not wait for torch."""
