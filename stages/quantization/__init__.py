"""Quantization grids: scales, zero points, codes."""
