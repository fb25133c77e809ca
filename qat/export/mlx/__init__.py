"""A folder that mlx-lm loads: grids of MLX as they are, everything else in one type.

MLX runs on Macs and, on processors, under Linux, so it is asked itself before an export is published.
"""

import io
from contextlib import redirect_stdout
from importlib.util import find_spec

from qat.config import Config, ExportType
from qat.errors import ConfigError, UnavailableError
from qat.export.exporter import Exporter
from qat.export.grids import EngineGrid
from qat.installation import to_install


def refuse(config: Config) -> None:
    """Refuses the export unless MLX is installed to read it.

    Raises:
        UnavailableError: it is not installed.
    """
    if find_spec("mlx_lm") is None or find_spec("mlx") is None:
        raise UnavailableError(f"export={config.export.name} is read back by mlx-lm: run `{to_install('engines')}`")


def refuse_architecture(described: dict[str, object]) -> None:
    """Refuses architectures that mlx-lm has no code for; where it is not installed, the export itself asks.

    Raises:
        ConfigError: it does not know the model type of this `config.json`.
    """
    if find_spec("mlx_lm") is None or find_spec("mlx") is None:
        return
    from mlx_lm import utils

    try:
        # Asks mlx-lm's own lookup; its public functions turn the answer into an exception.
        with redirect_stdout(io.StringIO()) as printed:
            utils._get_classes(described)
    except (ValueError, ImportError, SystemExit):  # code of some types ends the process where it lacks a package
        why = f" here ({' '.join(printed.getvalue().split())})" if printed.getvalue() else ""
        raise ConfigError(
            f"mlx-lm does not know models of type {described.get('model_type')}{why}: export=hf and export=packed are"
            " for transformers, which does"
        ) from None


EXPORTER = Exporter(
    types=(ExportType.fp16, ExportType.fp32),
    library="mlx",
    linear_alone=True,
    samples=1,  # one prompt only: every weight is compared by itself as well, and MLX is slow on CPUs
    grid=EngineGrid("MLX", ("shifted", "integers"), (2, 3, 4, 5, 6, 8), (32, 64, 128), "mlx_"),
    refuse=refuse,
    refuse_architecture=refuse_architecture,
    use="""\
```bash
pip install mlx-lm  # on Linux mlx-lm 'mlx[cpu]'
mlx_lm.generate --model {folder} --prompt "What is the capital of France?"
```""",
)
