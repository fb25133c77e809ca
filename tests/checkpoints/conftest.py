"""State dicts as the older scripts write them, and a plain forward pass of what they mean."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.models import ModelFolder
from tests import tiny


@dataclass(frozen=True)
class Variant:
    """One way in which such a file may look; the default is the fullest."""

    seed: int = 0
    entries: dict[str, int] = field(default_factory=lambda: {"mlp": 4, "self_attn": 16})
    ranks: dict[str, int] = field(default_factory=lambda: {"mlp": 4, "self_attn": 2})
    baked: int | None = 0  # the flag; None leaves it out
    stored: tuple[str, ...] = ("weight", "_Q", "_indices")
    index_type: torch.dtype = torch.int64
    value_type: torch.dtype = torch.float32
    ascending: bool = True
    positive: str | None = None  # how A and B are made positive
    magnitude: str = "identity"
    config: bool = True
    nested: bool = False
    others: bool = True  # norms, embeddings, head

    def but(self, **changes: Any) -> "Variant":
        return replace(self, **changes)

    @property
    def settings(self) -> dict[str, Any]:
        said: dict[str, Any] = {"version": "v2", "model_id": "someone/tiny", "magnitude_activation": self.magnitude}
        if self.positive:
            said |= {"force_positive_scales": True, "positive_scale_method": self.positive}
        return said


ACTIVATIONS = {"abs": torch.abs, "softplus": nn.functional.softplus}


def layer(
    variant: Variant, kind: str, shape: tuple[int, int], draw: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one linear layer, and its weight W = Q ⊙ S."""
    (outputs, inputs), rank, entries = shape, variant.ranks[kind], variant.entries[kind]
    A, B = torch.randn(outputs, rank, generator=draw), torch.randn(rank, inputs, generator=draw)
    g = torch.rand(rank, generator=draw) + 0.5
    lut = torch.linspace(-1, 1, entries) + torch.randn(entries, generator=draw) * 0.2 / entries
    if not variant.ascending:
        lut = lut[torch.randperm(entries, generator=draw)]
    if variant.baked:
        A, B, g = A / A.norm(dim=0) * g, B / B.norm(dim=1, keepdim=True), torch.ones(rank)
    A, B, g, lut = (part.to(variant.value_type) for part in (A, B, g, lut))
    index = torch.randint(entries, shape, generator=draw)
    Q, S = lut.float()[index], scale(variant, A.float(), B.float(), g.float())
    parts = {"scale_A": A, "scale_B": B, "rank_magnitude": g, "lut": lut}
    given = {"weight": Q * S, "_Q": Q.to(variant.value_type), "_indices": index.to(variant.index_type)}
    parts |= {name: given[name] for name in variant.stored}
    if variant.baked is not None:
        parts["_scales_baked_flag"] = torch.tensor(variant.baked, dtype=torch.int8)
    return parts, Q * S


def scale(variant: Variant, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    """S [O, I], read off the description of the format."""
    if variant.baked:
        return A @ B
    if variant.positive and variant.config:
        A, B = ACTIVATIONS[variant.positive](A), ACTIVATIONS[variant.positive](B)
    if variant.magnitude != "identity" and variant.config:
        g = ACTIVATIONS[variant.magnitude](g) + 1e-6
    a = torch.stack([column / max(float(column.norm()), 1e-6) for column in A.unbind(1)])
    b = torch.stack([row / max(float(row.norm()), 1e-6) for row in B])
    return torch.einsum("ro,r,ri->oi", a, g, b)


def write(variant: Variant, teacher: ModelFolder, file: Path) -> nn.Module:
    """Writes the files; returns the dense model that the older code computes, on its own weights."""
    draw = torch.Generator().manual_seed(variant.seed)
    model = teacher.load(torch.float32, tiny.CPU)
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            kind = name.split(".")[3]
            parts, weight = layer(variant, kind, tuple(module.weight.shape), draw)
            state |= {f"{name}.{part}": value for part, value in parts.items()}
            module.weight.data = weight
    if variant.others:
        for name, value in model.named_parameters():
            if "_proj" not in name:
                value.data = value + 0.1 * torch.randn(value.shape, generator=draw)
        state |= {name: value for name, value in model.state_dict().items() if "_proj" not in name}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state, "step": 7} if variant.nested else state, file)
    if variant.config:
        (file.parent / "config.json").write_text(json.dumps(variant.settings))
    return model


@pytest.fixture
def old(teacher: ModelFolder, tmp_path: Path):
    """Writes a state dict and returns its path and the model it means."""

    def make(**changes: Any) -> tuple[Path, nn.Module]:
        file = tmp_path / "old" / "best_state_dict.pt"
        return file, write(Variant(**changes), teacher, file)

    return make
