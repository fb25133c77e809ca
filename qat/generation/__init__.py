"""Many continuations at once: a decoding loop over transformers' models, recorded as a CUDA graph."""

from qat.generation.loop import Sampling, Writer, bytes_a_row

__all__ = ["Sampling", "Writer", "bytes_a_row"]
