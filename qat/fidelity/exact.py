"""A model in fp32 during a comparison, so that remaining differences are not due to rounding."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from qat.machine import exact_matmul
from qat.models.streamed import stream_of
from qat.quant.linear import quantized

SHORT = (torch.bfloat16, torch.float16)


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Inside, all 16-bit weights are widened, in host memory where a GPU has no room for them.

    Weights themselves stay where they are and come back unchanged, so that what was recorded on them holds. Those
    that are read when they are computed are widened then.
    """
    stream = stream_of(model)
    if stream is not None:
        stream.drop()
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    narrow = [tensor for tensor in tensors if tensor.dtype in SHORT]
    device = model.device if stream else _roomy(model.device, 4 * sum(tensor.numel() for tensor in narrow))
    moved = [tensor for tensor in tensors if tensor.dtype in SHORT or tensor.device != device]
    kept = [tensor.data for tensor in moved]
    baked = {layer: layer.dense for layer in quantized(model).values() if layer.dense is not None}
    for tensor in moved:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.dtype in SHORT else tensor.dtype)
    for layer, dense in baked.items():
        layer.dense = dense.to(device, torch.float32)
    try:
        with exact_matmul(), stream.widened() if stream else nullcontext():
            yield
    finally:
        for tensor, data in zip(moved, kept, strict=True):
            tensor.data = data
        for layer, dense in baked.items():
            layer.dense = dense


def _roomy(device: torch.device, more_bytes: int) -> torch.device:
    """The device, if it has room for so many more bytes."""
    if device.type != "cuda" or more_bytes < torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")
