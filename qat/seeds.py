"""Derived seeds: random draws depend on the numbers that name them, never on earlier draws."""

import torch


def generator(seed: int, number: int) -> torch.Generator:
    """One generator for each number below a seed."""
    return torch.Generator().manual_seed(mixed(seed, number))


def mixed(seed: int, number: int) -> int:
    """A seed of 32 bits for each number below another.

    torch reads the low 32 bits of a seed alone, so the two are mixed there; the factor is odd, so no
    two seeds of 32 bits share their first one.
    """
    return (seed * 0x9E3779B9 + number) % 2**32
