"""Settings: what a user may set, where each value came from, what a run keeps."""
