"""Model families: how a model is found, read one block at a time, and run."""
