"""Conformance kits: what an entry of each registry must do. Packages that add entries can run them in their tests."""
