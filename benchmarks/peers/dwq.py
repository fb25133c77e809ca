"""mlx_lm.dwq: scales and biases of MLX's rounded model, trained by mlx-lm to say what the teacher says.

The loss is KL at a temperature of 2 over the whole vocabulary, computed in fp32 as mlx-lm's kernel for Apple's GPUs
does (elsewhere it would take logarithms of bf16), the optimizer Adam, a step as many tokens as `mlx_lm.dwq` has
by default: four rows of 1,024. Its rate is for its caller to choose, as the default of 1e-6 moves a short training
nowhere. It computes in bf16, mlx-lm's default, on a GPU (Apple's, or `pip install 'mlx[cuda13]'`), and in fp32 on a
processor, where MLX computes 16-bit numbers some fifty times more slowly.
"""

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx_lm.quant import dwq
from mlx_lm.utils import load, quantize_model, save
from torch import Tensor

from qat.models import ModelFolder

SETTINGS = {"temperature": 2.0, "step_tokens": 4096, "seed": 123, "scales": "float16"}


@dataclass
class Seen:
    """What a training has read, in how many seconds after its first step, in which kernels are compiled."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def quantize(
    folder: ModelFolder,
    target: Path,
    bits: int,
    group: int,
    text_NL: Tensor,
    held_out_NL: Tensor,
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    """Writes a folder that mlx-lm loads; mlx-lm tells of its losses as it goes.

    Args:
        folder: the teacher.
        target: where to write.
        bits: of every layer and of the embedding.
        group: weights that share a scale and a bias.
        text_NL: rows that are read once, in mlx-lm's own order.
        held_out_NL: rows that its validation is taken on.
        rate: of Adam.
        seconds: of training after its first step; then it ends with what it has.

    Returns:
        How many steps and tokens it read.
    """
    dtype = mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    teacher, tokenizer, described = load(str(folder.path), return_config=True)
    student, _, _ = load(str(folder.path), return_config=True)
    teacher.set_dtype(dtype)
    student.set_dtype(dtype)
    with contextlib.redirect_stdout(io.StringIO()):  # it says how many bits there are
        student, described = quantize_model(student, described, group, bits)
    rows, validation = ([(row, 0) for row in ids.numpy()] for ids in (text_NL, held_out_NL))
    with _observed(rows, seconds) as seen, contextlib.redirect_stderr(io.StringIO()):  # bars
        dwq.dwq_quantize(
            student,
            lambda batch, number, split: teacher(batch),
            optimizers.Adam(learning_rate=rate, bias_correction=True),
            rows,
            validation,
            min(max(1, SETTINGS["step_tokens"] // text_NL.shape[1]), len(rows), len(validation)),
            max_seq_length=text_NL.shape[1] + 1,
            seed=SETTINGS["seed"],
            dtype=dtype,
            temperature=SETTINGS["temperature"],
        )
    print(f"mlx_lm.dwq, {bits} bits: {seen.steps} steps, {seen.tokens} tokens in {seen.seconds:.1f} s after the first")
    student.set_dtype(getattr(mx, SETTINGS["scales"]))
    save(target, str(folder.path), student, tokenizer, described)
    return {"steps": seen.steps, "tokens": seen.tokens}


@contextlib.contextmanager
def _observed(rows: list[tuple[list[int], int]], seconds: float) -> Iterator[Seen]:
    """While it holds, mlx-lm's training on `rows` ends in time, and its loss is computed in fp32."""
    seen, batches, loss = Seen(), dwq.iterate_batches, dwq.kl_div_loss

    def limited(data: Any, *arguments: Any, **settings: Any) -> Iterator[tuple[mx.array, mx.array]]:
        given = batches(data, *arguments, **settings)
        if data is not rows:
            yield from given
            return
        began = None
        for ids, lengths in given:
            seen.steps, seen.tokens = seen.steps + 1, seen.tokens + int(lengths[:, 1].sum())
            yield ids, lengths
            began = began or time.monotonic()
            seen.seconds = time.monotonic() - began
            if seen.seconds > seconds:
                return

    dwq.iterate_batches = limited
    dwq.kl_div_loss = lambda q, p: loss(q.astype(mx.float32), p.astype(mx.float32))
    try:
        yield seen
    finally:
        dwq.iterate_batches, dwq.kl_div_loss = batches, loss
