"""What a student's weights are made of, and how they are fitted to the teacher's."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from qat.config.keys import key


class KMeansBackend(Enum):
    """Who computes codebooks."""

    exact = "globally optimal weighted 1-D k-means"
    kmeans_pytorch = "the kmeans-pytorch package, bounded and seeded"


class WeightFormat(Enum):
    """How weights are written in few bits."""

    codebook = "a learned codebook for each layer, times a low-rank scale"
    grid = "fixed values, with a scale for each group of a row's columns"
    kquant = "llama.cpp's k-quants: groups whose scales are themselves of few bits, in rows of whole 256"
    vector = "a learned codebook of vectors for each layer, of several weights each, times a low-rank scale"


class Levels(Enum):
    """The values of a grid before they are scaled."""

    halves = "evenly spaced, half of them on either side of zero: -1.5, -0.5, 0.5, 1.5"
    integers = "whole numbers around zero, -2, -1, 0, 1, as in Q4_0 and Q8_0 of llama.cpp"
    shifted = "whole numbers from zero up, and groups share a shift too, as in MLX and Q4_1 of llama.cpp"
    iq4nl = "the sixteen values of IQ4_NL of llama.cpp, dense around zero"


# What a weight is for, each with a format of its own: in gated or plain MLPs, in attention, as rows for tokens, before
# the logits.
ROLES = ("mlp", "attn", "embed", "head")
USUAL_GROUPS = (32, 64, 128)  # weights that share a scale, as most engines have kernels for

# The keys of `WeightConfig` that each format has besides its name.
SETTINGS = {
    WeightFormat.codebook: ("bits", "rank"),
    WeightFormat.grid: ("bits", "group", "levels"),
    WeightFormat.kquant: ("bits",),
    WeightFormat.vector: ("bits", "dim", "rank"),
}


@dataclass
class WeightConfig:
    """What one kind of layers is written in."""

    bits: int = key(MISSING, "of the index of each weight into 2**bits values", low=1, high=8)
    rank: int | None = key(None, "codebook and vector: of the scale matrix", low=1)
    format: WeightFormat = WeightFormat.codebook
    group: int | None = key(None, "grid: columns that share a scale, a divisor of every row's length", low=1)
    levels: Levels = key(Levels.halves, "grid: the values before they are scaled")
    dim: int | None = key(None, "vector: adjacent weights that share an index of bits * dim bits, at most 12", low=2)


@dataclass
class QuantConfig:
    """Bits and formats; a role that is null stays in full precision."""

    name: str = MISSING
    mlp: WeightConfig | None = key(None, "of MLPs, experts included")
    attn: WeightConfig | None = key(None, "of attention, or of what mixes tokens in its place")
    embed: WeightConfig | None = key(None, "rows for tokens; of the head too where the model ties the two")
    head: WeightConfig | None = key(None, "before the logits; of a tied head null, or what embed is")
    layers: "dict[str, WeightConfig | None]" = key(
        {}, "by patterns of names, {model.layers.0.*: {bits: 4, rank: 8}}: the last that fits wins, null is dense"
    )
    megabytes: float | None = key(None, "budget: of the packed file, at most", above=0)
    bits: float | None = key(None, "budget: a weight over the whole model, at most", above=0, high=16)
    candidates: list[WeightConfig] = key([], "budget: formats that each layer may get which nothing else names")
    partial: bool = key(
        False, "goes on where a part would stay dense: weights that no rule has a role for, one of embed and head"
    )


@dataclass
class KMeansConfig:
    """Clustering backend of the codebooks."""

    name: str = MISSING
    backend: KMeansBackend = MISSING


@dataclass
class ConvertConfig:
    """How indices and the parts of formats are fitted."""

    name: str = MISSING
    calibration_tokens: int = key(16_384, "cached training tokens whose layer inputs weigh the errors", low=1)
    gradients: bool = key(False, "errors weigh as they change the model's output, not the layer's own")
    passes: int = key(1, "from the second on, layer inputs are those of the quantized model", low=1)
    rounds: int = key(8, "alternations of indices with codebooks, scales and shifts in the first pass", low=1)
    sweeps: int = key(0, "of coordinate descent over the indices in each pass", low=0)
