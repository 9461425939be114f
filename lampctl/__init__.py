"""What people see: commands, tables, progress, exit codes."""
