"""Random streams that a seed and a purpose decide together.

A generator seeded by the seed alone would give the same numbers for every purpose: masks that follow the first weights,
label noise that follows the order of the samples.
"""

import hashlib

import torch


def generator(purpose: str, seed: int) -> torch.Generator:
    """A generator on the CPU, independent of those for other purposes."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
