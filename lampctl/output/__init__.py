"""What people read: tables, progress, labels, units."""
