"""Many continuations at once: a decoding loop over transformers' models, recorded as a CUDA graph."""

from qat.generation.loop import Sampling, Writer, answers, bytes_a_row

__all__ = ["Sampling", "Writer", "answers", "bytes_a_row"]
