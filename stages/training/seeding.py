"""Seeds that depend on the purpose of random numbers, never on what ran before."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive_seed(run_seed, "compensate", block_index)``.

    A step that runs again after a crash gets the same random numbers, and adding a step does not change the random
    numbers of another one.
    """
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
