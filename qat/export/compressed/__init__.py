"""A compressed-tensors folder, as transformers and vLLM load it: packed whole numbers, a scale for each group."""

from importlib.util import find_spec

from qat.config import Config, ExportType
from qat.errors import UnavailableError
from qat.export.exporter import Exporter
from qat.export.grids import EngineGrid
from qat.installation import to_install


def refuse(config: Config) -> None:
    """Refuses the export unless the library that reads it is installed.

    Raises:
        UnavailableError: it is not installed.
    """
    if find_spec("compressed_tensors") is None:
        raise UnavailableError(
            f"export={config.export.name} is read back by compressed-tensors: run `{to_install('engines')}`"
        )


EXPORTER = Exporter(
    types=(ExportType.fp16, ExportType.fp32),
    grid=EngineGrid(
        "compressed-tensors", ("integers",), tuple(range(2, 9)), (), "compressed_", roles=("mlp", "attn", "head")
    ),
    linear_alone=True,
    refuse=refuse,
    use="""\
```python
from transformers import AutoModelForCausalLM  # pip install 'compressed-tensors>=0.18'
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
```
vLLM's code says that it loads layers of 4 or 8 bits, newer versions those of 2 to 8, if query, key and value have one
format, and gate and up: `vllm serve {folder}`. The embedding is dense, whatever the checkpoint has it in, and so is a
head that is tied to it.""",
)
