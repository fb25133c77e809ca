"""Compares an export's logits with those of its source before it is published."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.errors import ArtifactError
from qat.evaluate import samples_of
from qat.models import ModelFolder
from qat.quant.linear import baked

# The largest difference of all logits, relative to their norm, that rounding accounts for: half a unit in
# the last place of weights and activations (2⁻²⁴, 2⁻¹¹, 2⁻⁸), grown over some tens of layers.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


ROWS, TOKENS = 5, 16  # random rows used where there are no prompts, and tokens in each


def check(source: PreTrainedModel, export: PreTrainedModel, rows: list[Tensor], dtype: torch.dtype) -> float:
    """‖export − source‖ / ‖source‖ over all logits of a few texts.

    Args:
        source: in fp32.
        export: read back from what was written.
        rows: token ids [1, T] of each text.
        dtype: the type the export rounds to.

    Raises:
        ArtifactError: the export differs by more than that type's rounding; it must not be used.
    """
    difference = square = 0.0
    with torch.inference_mode(), baked(source, torch.float32), baked(export, export.dtype):
        for ids in rows:
            expected, given = source(ids).logits, export(ids).logits.float()
            difference += float((given - expected).double().square().sum())
            square += float(expected.double().square().sum())
    error = (difference / square) ** 0.5
    if not error <= TOLERANCE[dtype]:
        raise ArtifactError(
            f"the export's logits differ from the checkpoint's by {error:.2e} of their norm, and"
            f" {str(dtype).removeprefix('torch.')} explains {TOLERANCE[dtype]:.0e}: nothing was published;"
            " another export.dtype may hold the model's numbers, or what reads the export computes this model"
            " otherwise, and export=hf is right"
        )
    return error


def prompts(teacher: ModelFolder) -> list[Tensor]:
    """Token ids [1, T] of the sample prompts; any ids where there is no tokenizer to make them of words."""
    if teacher.has_tokenizer():
        return [torch.tensor([ids]) for ids in samples_of(teacher.tokenizer()).values()]
    draw = torch.Generator().manual_seed(0)
    return list(torch.randint(teacher.vocab_size(), (ROWS, 1, TOKENS), generator=draw))
