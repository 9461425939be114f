"""Data sets: where calibration and evaluation text comes from."""
