"""Conformance kits: what every storage and every step kind must satisfy, those of other packages included."""
