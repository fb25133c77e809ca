"""mlx_lm.dwq: scales and biases of MLX's rounded model, trained by mlx-lm to say what the teacher says.

The loss is KL at a temperature of 2 over the whole vocabulary, the optimizer Adam, as `mlx_lm.dwq` has them; its
rate is for its caller to choose, as the default of 1e-6 moves a short training nowhere.
"""

import contextlib
import io
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.utils import load, quantize_model, save
from torch import Tensor

from qat.models import ModelFolder

SETTINGS = {"temperature": 2.0, "batch": 4, "seed": 123, "scales": "float16"}


def quantize(folder: ModelFolder, target: Path, bits: int, group: int, text_NL: Tensor, rate: float) -> None:
    """Writes a folder that mlx-lm loads; `target` must not be there yet.

    It computes in fp32, since MLX computes fp16 some fifty times more slowly on processors.

    Args:
        folder: the teacher.
        target: where to write.
        bits: of every layer and of the embedding.
        group: weights that share a scale and a bias.
        text_NL: rows that are read once; the first batch of them is also what mlx-lm calls validation.
        rate: of Adam.
    """
    teacher, tokenizer, described = load(str(folder.path), return_config=True)
    teacher.set_dtype(mx.float32)
    student, _, _ = load(str(folder.path), return_config=True)
    student.set_dtype(mx.float32)
    with contextlib.redirect_stdout(io.StringIO()):  # it says how many bits there are
        student, described = quantize_model(student, described, group, bits)
    rows = [(row, 0) for row in text_NL.tolist()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dwq_quantize(
            student,
            lambda batch, number, split: teacher(batch),
            optimizers.Adam(learning_rate=rate, bias_correction=True),
            rows,
            rows[: SETTINGS["batch"]],
            SETTINGS["batch"],
            max_seq_length=text_NL.shape[1] + 1,
            seed=SETTINGS["seed"],
            dtype=mx.float32,
            temperature=SETTINGS["temperature"],
        )
    student.set_dtype(getattr(mx, SETTINGS["scales"]))
    save(target, str(folder.path), student, tokenizer, described)
