"""The machine that a run has."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import key

SWITCH = ("auto", "true", "false")
PLACES = ("device", "host")


class Device(Enum):
    """What computes."""

    auto = "CUDA, else Apple's GPU, else the CPU"
    cpu = "the CPU"
    cuda = "an NVIDIA GPU"
    mps = "an Apple GPU"


class Precision(Enum):
    """The type of matrix products; parameters and reductions stay fp32."""

    auto = "bf16 where the hardware computes it, else fp16 on a GPU of NVIDIA and fp32 elsewhere"
    bf16 = "bfloat16"
    fp16 = "float16, the loss scaled so that small gradients survive"
    fp32 = "float32"


@dataclass
class InstanceConfig:
    """The machine; it decides speed and memory, never the result."""

    name: str = MISSING
    device: Device = Device.auto
    precision: Precision = Precision.auto
    micro_batch: int = key(16, "sequences computed at once; halved when memory runs out", low=1)
    devices: int = key(1, "GPUs (or CPU processes) that share each batch, and the states of latent weights", low=1)
    compile: str = key("auto", "torch.compile for the decoder layers; auto is on CUDA", words=SWITCH)
    moments: str = key("device", "memory of latent weights' AdamW moments; host if a GPU's is short", words=PLACES)
    checkpointing: str = key("auto", "activations computed twice; auto is when memory runs out", words=SWITCH)
