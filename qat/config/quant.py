"""What a student's weights are made of, and how they are fitted to the teacher's."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import key


class KMeansBackend(Enum):
    """Who computes codebooks."""

    exact = "globally optimal weighted 1-D k-means"
    kmeans_pytorch = "the kmeans-pytorch package, bounded and seeded"


@dataclass
class TableConfig:
    """Lookup tables of one kind of layer."""

    bits: int = key(MISSING, "a codebook has 2**bits entries", low=1, high=8)
    rank: int = key(MISSING, "of the scale matrix", low=1)


@dataclass
class QuantConfig:
    """Bits and ranks; a kind that is null stays in full precision."""

    name: str = MISSING
    mlp: TableConfig | None = key(None, "gate, up, down")
    attn: TableConfig | None = key(None, "q, k, v, o")
    partial: bool = key(
        False, "goes on where projections of a model have other names than these, which stay dense"
    )


@dataclass
class KMeansConfig:
    """Clustering backend of the codebooks."""

    name: str = MISSING
    backend: KMeansBackend = MISSING


@dataclass
class ConvertConfig:
    """How the fit of tables and scales is done."""

    name: str = MISSING
    calibration_tokens: int = key(16_384, "cached training tokens whose layer inputs weigh the errors", low=1)
    gradients: bool = key(False, "errors weigh as they change the model's output, not the layer's own")
    passes: int = key(1, "from the second on, layer inputs are those of the quantized model", low=1)
    rounds: int = key(8, "alternations of indices, tables and scales in the first pass", low=1)
    sweeps: int = key(0, "of coordinate descent over the indices in each pass", low=0)
