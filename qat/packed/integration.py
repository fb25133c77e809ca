"""Packed exports inside transformers: a configuration that stands for another one, and a quantizer.

Plain transformers must not load such a folder: it would take the tables for stray tensors and run with
random weights. So `config.json` names a model type it does not know, and the weights lie in a file it
does not look for. Once registered, `PackedConfig` hands out the configuration of the real architecture,
and the quantizer puts `PackedLinear` where the tables belong.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.packed import FILE, METHOD
from qat.packed.linear import PackedLinear
from qat.quant import formats
from qat.quant.formats import Format


class PackedConfig(PreTrainedConfig):
    """`config.json` of a packed export: `base_config` is the architecture's own."""

    model_type = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The architecture's configuration, told where the weights are and how they are packed."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        base = dict(config_dict["base_config"])
        base |= {"quantization_config": config_dict["quantization_config"], "transformers_weights": FILE}
        return CONFIG_MAPPING[base["model_type"]].from_dict(base, **kwargs)


class PackedQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed export.

    Attributes:
        layers: the format of each quantized layer, by name, as `Format.settings` says it.
        bits_per_weight: over all of them, scales and tables included.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], bits_per_weight: float, **kwargs: Any) -> None:
        self.quant_method = cast(Any, METHOD)  # a name of ours, none of the enumeration
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
                    model.set_submodule(name, packed_like(model.get_submodule(name), formats.of(settings)))

        def is_serializable(self) -> bool:
            """Not by `save_pretrained`, which would write a folder that only looks like an export."""
            return False

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedQuantizationConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer


def packed_like(linear: nn.Linear, format: Format) -> PackedLinear:
    """An empty packed layer in the place of a dense one."""
    packed = PackedLinear(format, linear.out_features, linear.in_features, linear.bias is not None)
    if packed.bias is not None:
        packed.bias.data = packed.bias.data.to(linear.weight.dtype)
    return packed
