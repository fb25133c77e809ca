"""Quantization-aware distillation of small language models to codebooks with low-rank scales."""

from qat import registration

registration.install()
