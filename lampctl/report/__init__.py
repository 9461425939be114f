"""What came of runs, for people: a table of several side by side, and a page with figures."""
