"""What disks see: the plan of a run, its directory, commits and resumption."""
