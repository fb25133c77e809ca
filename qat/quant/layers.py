"""Which layers of a model are quantized, of which kind, and which of them see the same input."""

from dataclasses import dataclass

from torch import nn

from qat.config import QuantConfig, TableConfig
from qat.errors import ConfigError

KINDS = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
SAME_INPUT = {"up_proj": "gate_proj", "k_proj": "q_proj", "v_proj": "q_proj"}


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantize. `source` names the layer whose input it shares, itself included."""

    name: str
    kind: str
    shape: tuple[int, int]
    bits: int
    rank: int

    @property
    def source(self) -> str:
        """The layer at which this layer's input is observed."""
        parent, _, leaf = self.name.rpartition(".")
        return f"{parent}.{SAME_INPUT.get(leaf, leaf)}"

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Index bits plus what scales and table add, both counted as 16-bit numbers."""
        outputs, inputs = self.shape
        extra = self.rank * (outputs + inputs) + 2**self.bits
        return self.bits + 16 * extra / self.weights


def select(model: nn.Module, quant: QuantConfig) -> list[Layer]:
    """The layers that `quant` covers, in the model's order.

    Raises:
        ConfigError: the model has none, so it is of an architecture with other layer names.
    """
    specs = {"mlp": quant.mlp, "attn": quant.attn}
    kind_of = {leaf: kind for kind, leaves in KINDS.items() for leaf in leaves}
    found = []
    for name, module in model.named_modules():
        kind = kind_of.get(name.rpartition(".")[2])
        spec: TableConfig | None = specs.get(kind) if kind else None
        if isinstance(module, nn.Linear) and kind and spec:
            found.append(Layer(name, kind, (module.out_features, module.in_features), spec.bits, spec.rank))
    if not found:
        leaves = ", ".join(leaf for leaves in KINDS.values() for leaf in leaves)
        raise ConfigError(
            f"quant={quant.name} finds no layer to quantize: the model has no linear layer named {leaves}"
        )
    return found


def bits_per_weight(layers: list[Layer]) -> float:
    """Mean over all quantized weights."""
    return sum(layer.weights * layer.bits_per_weight for layer in layers) / sum(layer.weights for layer in layers)


def summary(layers: list[Layer]) -> dict[str, float | int]:
    """Counts and effective bits, as `result.json` has them."""
    kinds = {kind: [layer for layer in layers if layer.kind == kind] for kind in KINDS}
    figures: dict[str, float | int] = {
        "bits_per_weight": round(bits_per_weight(layers), 4),
        "layers": len(layers),
    }
    for kind, members in kinds.items():
        figures[f"{kind}_layers"] = len(members)
        if members:
            figures[f"{kind}_bits_per_weight"] = round(bits_per_weight(members), 4)
    return figures
