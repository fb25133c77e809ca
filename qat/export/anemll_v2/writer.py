"""The state dict by the names that the V2 scripts know, and the `config.json` beside it."""

import json
from pathlib import Path
from typing import Any
from typing import cast as cast_type

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import checkpoints
from qat.checkpoints import v2
from qat.config import ExportConfig, ExportType
from qat.errors import ConfigError
from qat.export.source import DTYPES, EXACT, Source, cast, copy_tokenizer, require_codebooks
from qat.quant.embedding import restore
from qat.quant.linear import QuantLinear, quantized
from qat.quant.lookup import look_up

FILE = "best_state_dict.pt"


def write(source: Source, folder: Path, settings: ExportConfig) -> None:
    """Writes the state dict, `config.json` and the tokenizer.

    Raises:
        ConfigError: a layer is no codebook, or none that the layout has a place for.
        NumericsError: a value does not fit into fp16.
    """
    require_codebooks(source, "export=anemll_v2")
    _require_layers(source)
    restore(source.model)
    snapped = settings.dtype is ExportType.fp16
    torch.save(state_dict(source, snapped), folder / FILE)
    (folder / "config.json").write_text(json.dumps(description(source), indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(source.teacher, folder)


def _require_layers(source: Source) -> None:
    """Refuses a student with quantized matrices that are no linear layers of the names in the layout."""
    modules = dict(source.teacher.skeleton().named_modules())
    for layer in source.layers:
        if type(modules.get(layer.name)) is not nn.Linear or layer.name.rpartition(".")[2] not in v2.ROLE_OF:
            raise ConfigError(
                f"export=anemll_v2 has a place for {', '.join(v2.ROLE_OF)} layers alone, and none for {layer.name}:"
                " export=packed and export=hf take any"
            )


@torch.no_grad()
def state_dict(source: Source, snapped: bool) -> dict[str, Tensor]:
    """All tensors of the model: the parts of every quantized layer, and everything else as it is."""
    modules = {name: cast_type(QuantLinear, module) for name, module in quantized(source.model).items()}
    state: dict[str, Tensor] = {}
    latents = source.latent()
    for name, module in modules.items():
        latent = latents.get(name)
        parts = _snapped(name, module) if snapped else _plain(module)
        parts["weight"] = cast(name, module.weight(torch.float32) if latent is None else latent, parts["lut"].dtype)
        state |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias
    for name, value in source.model.state_dict().items():
        if name.rpartition(".")[0] not in modules:
            state[name] = value.detach()
    return state


def _plain(module: QuantLinear) -> dict[str, Tensor]:
    parts = module.normalized()
    codebook = parts.pop("codebook")
    return parts | {"lut": codebook, "_scales_baked_flag": _flag(0)} | _indices(module, codebook)


def _snapped(name: str, module: QuantLinear) -> dict[str, Tensor]:
    parts = module.normalized()
    magnitude = parts["rank_magnitude"]
    parts = {
        "scale_A": cast(name, parts["scale_A"] * magnitude, torch.float16),
        "scale_B": cast(name, parts["scale_B"], torch.float16),
        "rank_magnitude": torch.ones_like(magnitude, dtype=torch.float16),
        "lut": cast(name, parts["codebook"], torch.float16),
    }
    return parts | _indices(module, parts["lut"]) | {"_scales_baked_flag": _flag(1)}


def _indices(module: QuantLinear, codebook: Tensor) -> dict[str, Tensor]:
    # int64, as code that indexes with uint8 would take it for a mask.
    return {"_Q": look_up(codebook, module.indices), "_indices": module.indices.long()}


def _flag(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int8)


def description(source: Source) -> dict[str, Any]:
    """What `config.json` says; shapes in the state dict have the last word."""
    quant, origin = source.manifest["quant"], source.manifest.get("source", {})
    kinds = {kind: quant[kind] for kind in ("mlp", "attn") if quant.get(kind)}
    first = next(iter(kinds.values()))
    said: dict[str, Any] = {
        "version": "v2",
        "model_id": origin.get("model_id") or model_id(source),
        "config_preset": quant["name"],
        "lut_bits": first["bits"],
        "scale_rank": first["rank"],
        "force_positive_scales": False,
        "magnitude_activation": "identity",
    }
    for kind, format in kinds.items():
        said |= {f"{kind}_lut_bits": format["bits"], f"{kind}_scale_rank": format["rank"]}
    loss = source.record.number("metrics", "kd_loss_best")
    loss = origin.get("final_loss") if loss is None else loss
    return said if loss is None else said | {"final_loss": loss}


def model_id(source: Source) -> str:
    """The hub's name of the teacher where its folder knows it, else ours."""
    config = source.teacher.settings()
    origin = source.teacher.fingerprint.partition("@")[0]
    return origin if "/" in origin else str(getattr(config, "_name_or_path", "") or source.teacher.name)


def rounding(settings: ExportConfig) -> torch.dtype:
    """The coarsest type that a weight is rounded to."""
    return DTYPES[settings.dtype]


def read(source: Source, folder: Path) -> PreTrainedModel:
    """The student as this project reads such a file."""
    return checkpoints.load(folder / FILE, source.teacher, EXACT)[0]
