"""Checks on a few real rows that a faster forward pass gives the model's own results, before anything relies on it.

The measure is the model's own forward pass in transformers, with eager attention in fp32, each document of a
row alone. No list says which architectures may be computed how: the fastest pass whose log-probabilities are
the same is taken. Masks, positions, packing and the head are looked at in fp32, where rounding hides nothing;
kernels of 16-bit types in their own type, where they may be as far away as the model itself is.

sample.py     a few rows and the documents in them
exact.py      a model in fp32 for a while
trial.py      which pass a model takes
"""

from qat.fidelity.sample import Sample
from qat.fidelity.trial import ready, settle

__all__ = ["Sample", "ready", "settle"]
