"""Describes an export format before anything is written; used by the command line, so torch is not imported."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qat.config import FORMATS, Config, ExportConfig, ExportType
from qat.errors import ConfigError
from qat.export.grids import LayerRule, Settings
from qat.names import TEACHER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat.models import ModelFolder


@dataclass(frozen=True)
class Exporter:
    """A format, declared as `EXPORTER` by its package in `qat/export/`.

    The package's module `writer` has `write(source, folder, settings)`, `read(source, folder)`, which gives a model
    to compare with the source, and `rounding(settings)`, the coarsest type that a weight is rounded to.

    Attributes:
        types: those that weights can be written in.
        use: how the export is used, for its card; `{folder}` is the name of its folder.
        library: what reads it, as model hubs call it.
        takes_teacher: a teacher that is not quantized can be written too.
        bounded: it never holds more than `export.context` tokens.
        sized: its file is the one whose bytes `quant.file_bytes` tells, so they are told in its type.
        samples: prompts that it is compared on, the first ones; None takes all.
        grid: what its quantized weights lie on; None takes any format, or says itself what it does not.
        writes_out: with `export.dense`, weights that it would refuse or round are written as they are.
        linear_alone: its reader takes packed weights into torch's own linear layers, and into no other class.
        adapts: PEFT puts adapters on the model that reads it.
        merges: with `export.merge`, adapters are added to its weights, which are on no grid.
        refuse: raises a `QatError` for anything else that cannot be written.
        refuse_architecture: raises one for a `config.json` that the reader cannot compute.
        refuse_tokenizer: raises one for a teacher whose tokenizer the reader would take for another.
    """

    types: tuple[ExportType, ...]
    use: str
    library: str = "transformers"
    takes_teacher: bool = False
    bounded: bool = False
    sized: bool = False
    samples: int | None = None
    grid: LayerRule | None = None
    writes_out: bool = False
    linear_alone: bool = False
    adapts: bool = False
    merges: bool = False
    refuse: Callable[[Config], None] = lambda config: None
    refuse_architecture: Callable[[dict[str, Any]], None] = lambda described: None
    refuse_tokenizer: Callable[["ModelFolder"], None] = lambda teacher: None

    def check(self, config: Config, layers: Mapping[str, Settings], adapted: bool = False) -> None:
        """Checks that this export can be written as configured.

        Args:
            config: of `stage=export`.
            layers: of the checkpoint, as its manifest has them; none where it is not known yet what they are.
            adapted: it has adapters.

        Raises:
            ConfigError: not in this type, not of the teacher, not of such layers or not with adapters.
            QatError: what the format refuses by itself.
        """
        export = config.export
        if export.dtype not in self.types:
            known = " or ".join(dtype.name for dtype in self.types)
            raise ConfigError(f"export.dtype={export.dtype.name}: export={export.name} is written in {known}")
        if config.checkpoint.name == TEACHER and not self.takes_teacher:
            others = " or ".join(f"export={name}" for name in FORMATS if exporter(name).takes_teacher)
            raise ConfigError(
                f"export={export.name} needs a quantized model: checkpoint=<path>; the teacher takes {others}"
            )
        self.refuse_layers(layers, export)
        self.refuse_adapters(adapted, export)
        self.refuse(config)

    def refuse_layers(self, layers: Mapping[str, Settings], export: ExportConfig) -> None:
        """Looks whether layers are on the grid of this format, or are to be written out.

        Raises:
            ConfigError: one is not.
        """
        if export.dense and not self.writes_out:
            others = " or ".join(f"export={name}" for name in FORMATS if exporter(name).writes_out)
            raise ConfigError(f"export.dense=true: means nothing to export={export.name}, but to {others}")
        if self.grid is not None and not export.dense:
            self.grid.refuse(layers)

    def refuse_classes(self, model: "PreTrainedModel", names: Iterable[str], export: ExportConfig) -> None:
        """Looks whether the layers of a model are of the classes that the reader knows.

        Args:
            model: names and classes are enough.
            names: of the layers that are quantized.
            export: as configured.

        Raises:
            ConfigError: one is of another.
        """
        from qat.quant.places import is_plain

        strange = next((name for name in names if not is_plain(model, name)), None) if self.linear_alone else None
        if strange is not None:
            kind = type(model.get_submodule(strange)).__name__
            raise ConfigError(
                f"export={export.name}: {strange} is a {kind} in this architecture, and what reads the export takes few"
                " bits in a Linear of torch alone: export=packed and export=hf take it"
            )

    def refuse_adapters(self, adapted: bool, export: ExportConfig) -> None:
        """Looks whether a checkpoint's adapters, if it has any, have a place.

        Raises:
            ConfigError: they have none, or there are none to merge.
        """
        if export.merge and not self.merges:
            merging = " or ".join(f"export={name}" for name in FORMATS if exporter(name).merges)
            raise ConfigError(
                f"export.merge=true: export={export.name} holds weights of few bits, and none with adapters added to"
                f" them: use {merging}"
            )
        if export.merge and not adapted:
            raise ConfigError("export.merge=true: the checkpoint has no adapters; those of mode=lora have")
        if adapted and not self.adapts:
            others = " or ".join(f"export={name}" for name in FORMATS if exporter(name).adapts)
            raise ConfigError(
                f"export={export.name} has no place for adapters: use {others}, or export=hf export.merge=true"
            )


def exporter(name: str) -> Exporter:
    """What the package of a format, one of `qat.config.FORMATS`, declares."""
    declared = importlib.import_module(f"qat.export.{name}").EXPORTER
    assert isinstance(declared, Exporter)
    return declared
