"""Which device computes, and in which type: the `instance` group made concrete.

Nothing here changes a result. Numerics that need full precision (second moments, normal equations,
factorisations) ask for `exact_matmul`, whatever the rest of the run uses.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qat.config import Device, InstanceConfig, Precision
from qat.errors import MissingError
from qat.processes import place

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}

WIDENING = torch.__version__ >= "2.8"  # this torch can return products of 16-bit matrices in fp32

MEASURED = 2048  # rows and columns of the matrices whose product is timed
SWITCH = {"auto": None, "true": True, "false": False}


@dataclass(frozen=True)
class Machine:
    """The resolved instance.

    Attributes:
        device: of this process.
        dtype: of matrix products.
        micro_batch: sequences computed at once.
        compile: the decoder layers are compiled.
        checkpointing: activations are computed again in the backward pass; None when memory runs out.
        instance: the option that asked for it.
        host_moments: AdamW's moments of latent weights are in host memory.
    """

    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    compile: bool = False
    checkpointing: bool | None = None
    instance: str = ""
    host_moments: bool = False

    def describe(self) -> str:
        """One phrase for logs and `result.json`."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"

    def made_with(self) -> dict[str, Any]:
        """What affects the last bits of what it computes: all of an artifact that is gone on with is made with one."""
        return {"machine": self.describe(), "rows_at_once": self.micro_batch, "torch": torch.__version__}

    def place(self) -> dict[str, Any]:
        """What a manifest says of where something was made."""
        return {"instance": self.instance, "device": self.describe(), "threads": torch.get_num_threads()}


def resolve(instance: InstanceConfig) -> Machine:
    """The machine to use.

    Raises:
        MissingError: the instance asks for a device that this computer lacks, or for more than it has.
    """
    device = _device(instance)
    precision = instance.precision
    if precision is Precision.auto:
        precision = _precision(device)
    compiled, checkpointing = SWITCH[instance.compile], SWITCH[instance.checkpointing]
    if compiled is None:
        compiled = device.type == "cuda"
    host = instance.moments == "host"
    return Machine(device, DTYPES[precision], instance.micro_batch, compiled, checkpointing, instance.name, host)


def _precision(device: torch.device) -> Precision:
    if computes_bf16(device):
        return Precision.bf16
    return Precision.fp16 if device.type == "cuda" else Precision.fp32


def _device(instance: InstanceConfig) -> torch.device:
    device = _kind(instance)
    together = instance.devices > 1 or place().count > 1
    return _own_gpu(instance) if device.type == "cuda" and together else device


def _kind(instance: InstanceConfig) -> torch.device:
    there = {
        Device.cuda: torch.cuda.is_available(),
        Device.mps: torch.backends.mps.is_available(),
        Device.cpu: True,
    }
    if instance.device is Device.auto:
        return torch.device(next(device.name for device, available in there.items() if available))
    if not there[instance.device]:
        raise MissingError(
            f"instance={instance.name} needs a {instance.device.name} device and torch {torch.__version__} finds none"
            " here: use instance=auto or instance=cpu"
        )
    return torch.device(instance.device.name)


def _own_gpu(instance: InstanceConfig) -> torch.device:
    """The GPU of this process among those that share the batches."""
    index, here = place().local, torch.cuda.device_count()
    if max(instance.devices, index + 1) > here:
        raise MissingError(f"instance.devices={max(instance.devices, index + 1)}: this computer has {here}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def computes_bf16(device: torch.device) -> bool:
    """True where bf16 products run in hardware; emulated ones (T4, older CPUs) are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Full fp32 products inside: TF32 in a second moment or a normal equation ruins a fit (KL 2.38, not 1.35)."""
    with _matmul_precision("medium" if _medium_is_exact() else "highest"):
        yield


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _medium_is_exact() -> bool:
    """True where the precision "medium" rounds nothing: it has oneDNN multiply, which rounds to bf16 only with AMX.

    The usual product on an x86 CPU is MKL's, and that has half the speed of oneDNN's on AMD's processors.
    """
    if torch.cuda.is_available():
        return False
    a = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with _matmul_precision("medium"):
        product = (a @ a).double()
    exact = a.double() @ a.double()
    return bool((product - exact).norm() < 1e-6 * exact.norm())


def widened(hidden_PD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Logits [P, V] in fp32; on CUDA they are never rounded to the compute type."""
    if hidden_PD.is_cuda and hidden_PD.dtype != torch.float32 and WIDENING:
        return torch.mm(hidden_PD, weight_VD.mT, out_dtype=torch.float32)
    return (hidden_PD @ weight_VD.mT).float()


def matmul_flops(machine: Machine, size: int = MEASURED, repeats: int = 4) -> float:
    """Operations a second of a large square product in the compute type: the ceiling that mfu is measured by."""
    draw = torch.Generator(machine.device).manual_seed(0)
    a = torch.randn(size, size, generator=draw, dtype=torch.float32, device=machine.device).to(machine.dtype)
    _timed_products(a, 1)
    return 2 * size**3 * repeats / _timed_products(a, repeats)


def _timed_products(a: torch.Tensor, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        a @ a
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
