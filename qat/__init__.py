"""Quantization-aware distillation of small language models to a few bits a weight."""

from qat import registration

registration.install()
