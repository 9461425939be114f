"""Options, exit codes and stop sources of the command line."""
