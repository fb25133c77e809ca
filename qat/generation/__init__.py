"""Many continuations at once: a decoding loop over transformers' models, recorded as a CUDA graph.

loop.py       the loop, for models with plain attention
memory.py     keys and values of the text so far
sampling.py   the choice of a token; kernels.py on CUDA
own.py        transformers' own loop, for all others
rows.py       how many rows are written at once, and texts in a batch
settle.py     which of the two a model gets
"""

from qat.generation.loop import TEXTS_A_ROW, Sampling, Writer, answers, bytes_a_row
from qat.generation.own import OwnWriter
from qat.generation.rows import rows_at_once
from qat.generation.settle import writer

__all__ = ["TEXTS_A_ROW", "OwnWriter", "Sampling", "Writer", "answers", "bytes_a_row", "rows_at_once", "writer"]
