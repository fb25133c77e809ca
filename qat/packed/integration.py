"""Packed exports inside transformers: a configuration that stands for another one, and a quantizer.

Plain transformers must not load such a folder: it would take their parts for stray tensors and run with
random weights. So `config.json` names a model type it does not know, and the weights lie in a file it
does not look for. Once registered, `PackedConfig` hands out the configuration of the real architecture,
and the quantizer puts packed modules where dense ones were.
"""

from pathlib import Path
from typing import Any, cast

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat import older
from qat.errors import ArtifactError
from qat.manifests import PACKED, Wrong
from qat.packed import FILE, METHOD
from qat.packed.linear import SIXTEEN, put
from qat.quant import formats
from qat.quant.formats import Format
from qat.quant.places import place
from qat.tensor_files import FLOATS, Wanted, difference, entries, known

REMEDY = "export the model again"


class PackedConfig(PreTrainedConfig):
    """`config.json` of a packed export: `base_config` is the architecture's own."""

    model_type = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The architecture's configuration, told where the weights are and how they are packed."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        try:
            PACKED(config_dict, "")
        except Wrong as wrong:
            raise ArtifactError(f"config.json describes no packed export ({wrong}): {REMEDY}") from None
        base = dict(config_dict["base_config"])
        if base["model_type"] not in CONFIG_MAPPING:
            raise ArtifactError(f"a packed export of the model type {base['model_type']}, which transformers lacks")
        base |= {"quantization_config": config_dict["quantization_config"], "transformers_weights": FILE}
        return CONFIG_MAPPING[base["model_type"]].from_dict(base, **kwargs)


class PackedQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed export.

    Attributes:
        layers: the format of each quantized layer, by name, as `Format.settings` says it.
        bits_per_weight: over all of them, scales and codebooks included.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], bits_per_weight: float, **kwargs: Any) -> None:
        self.quant_method = cast(Any, METHOD)  # our own name, which is not in the enumeration of transformers
        self.layers = layers
        self.bits_per_weight = bits_per_weight


def register_config() -> None:
    """Makes `AutoConfig` know `PackedConfig`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(METHOD, PackedConfig, exist_ok=True)


def register_quantizer() -> None:
    """Makes transformers know the quantizer."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    class PackedQuantizer(HfQuantizer):
        """Puts packed layers where dense ones were, before the weights are read."""

        quantization_config: PackedQuantizationConfig
        requires_calibration = True
        is_trainable = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                for name, settings in self.quantization_config.layers.items():
                    format = formats.of(settings)
                    check_place(model, name, format)
                    put(model, name, format)
            check_tensors(model, [Path(file) for file in kwargs.get("checkpoint_files") or []])

        def get_weight_conversions(self) -> list[Any]:
            """New names of a part that older exports call differently."""
            from transformers.core_model_loading import WeightRenaming

            return [WeightRenaming(rf"\.{before}$", f".{now}") for before, now in older.PARTS.items()]

        def is_serializable(self) -> bool:
            """False: `save_pretrained` would write a folder that only looks like an export."""
            return False

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedQuantizationConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer


def check_place(model: Any, name: str, format: Format) -> None:
    """Checks that a model has a matrix of this name that can be quantized, of a shape that suits the format.

    Raises:
        ArtifactError: it has none.
    """
    found = place(model, name)
    if found is None:
        raise ArtifactError(f"the packed export has {name} in few bits, and its model no such layer: {REMEDY}")
    if misfit := format.misfit(*found.shape):
        value = format.settings()[misfit.setting]
        raise ArtifactError(f"the packed export says {misfit.setting} {value} of {name}, which {misfit.why}: {REMEDY}")


def check_tensors(model: Any, files: list[Path]) -> None:
    """Checks that the files hold exactly the tensors of a model on no device; transformers only warns otherwise.

    Raises:
        ArtifactError: a tensor is missing, has another type or shape, or is not part of the model.
    """
    wanted = {name: Wanted(_kinds(value), tuple(value.shape)) for name, value in model.state_dict().items()}
    for file in files:
        stored = entries(file, REMEDY)[0]
        called = older.names(stored)
        found = {called[name]: (entry.kind, entry.shape) for name, entry in stored.items()}
        tied = {name for name in getattr(model, "all_tied_weights_keys", None) or {} if name not in found}
        if wrong := difference(found, {name: one for name, one in wanted.items() if name not in tied}):
            raise ArtifactError(f"{file} {wrong}: {REMEDY}")


def _kinds(value: torch.Tensor) -> tuple[str, ...]:
    """Types that a tensor may be stored in: parts of formats have one type, other numbers the type of the export."""
    return FLOATS if value.is_floating_point() and value.dtype is not SIXTEEN else (known(value)[0],)
