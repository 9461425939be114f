"""Pruners: from a weight matrix and statistics of its inputs to a mask and new weights."""
