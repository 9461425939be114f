"""The run directory: records, commits, payloads, checkpoints, leases, and where they are stored."""
