"""Quantization-aware distillation of small language models to lookup tables with low-rank scales."""

from qat import registration

registration.install()
