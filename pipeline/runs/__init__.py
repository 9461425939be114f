"""Runs as a whole: prepare, begin, resume, status, comparison."""
