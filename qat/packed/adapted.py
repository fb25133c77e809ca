"""Packed linear layers for PEFT, which knows layers by their classes and takes others from a configuration.

https://huggingface.co/docs/peft/developer_guides/custom_models, "Experimental support for dynamic dispatch of custom
modules in LoRA". The configuration of every adapter names these layers, so that whoever loads one need not.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from qat.errors import ConfigError
from qat.packed.linear import PackedLinear


def register_layer() -> None:
    """Lets every `LoraConfig` know packed layers."""
    from peft.tuners.lora.config import LoraConfig

    config: Any = LoraConfig
    begin = config.__post_init__

    def __post_init__(self: Any) -> None:
        begin(self)
        self._register_custom_module({PackedLinear: _layer()})

    config.__post_init__ = __post_init__


@cache
def _layer() -> type[nn.Module]:
    """PEFT's layer around a packed one."""
    from peft.tuners.lora.layer import Linear

    class Linear4Packed(Linear):
        """The product with a packed weight, and what adapters add."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return module.in_features, module.out_features  # type: ignore[return-value]

        def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, None]:
            return base_layer.indices.device, None  # adapters keep their own type

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refused: what is packed holds no other weights.

            Raises:
                ConfigError: always.
            """
            raise ConfigError(
                "a packed weight cannot hold a merged one: export the checkpoint with export=hf export.merge=true"
            )

    return Linear4Packed
