"""`import qat` makes transformers read packed exports, and PEFT adapt them, at no cost where neither is used.

Two modules of transformers keep the registers of configurations and of quantizers, and one of PEFT says which layers
can be adapted. Each is filled right after it has been imported, by whoever imports it, before or after `import qat`;
until then nothing of them or of torch is loaded.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTERS = {
    "transformers.models.auto.configuration_auto": "qat.packed.integration.register_config",
    "transformers.quantizers.auto": "qat.packed.integration.register_quantizer",
    "peft.tuners.lora.config": "qat.packed.adapted.register_layer",
}


class AfterImport(MetaPathFinder):
    """Lets the ordinary finder find the registers, and fills each once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec of a register, its loader followed by ours; None for any other module."""
        if fullname not in REGISTERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            fill(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def fill(register: str) -> None:
    """Enters the packed format into one of the registers."""
    module, _, function = REGISTERS[register].rpartition(".")
    getattr(importlib.import_module(module), function)()


def install() -> None:
    """Fills the registers that are loaded already and waits for the others."""
    for register in REGISTERS:
        if register in sys.modules:
            fill(register)
    sys.meta_path.insert(0, AfterImport())
