"""One file for llama.cpp: weights on its own grids as they are, with all it needs to answer a chat."""

from qat.config import ExportType
from qat.export.exporter import Exporter
from qat.export.gguf.families import refuse_architecture
from qat.export.gguf.types import Types

FILE = "model.gguf"

EXPORTER = Exporter(
    types=tuple(ExportType),
    library="gguf",
    takes_teacher=True,
    grid=Types(),
    writes_out=True,
    refuse_architecture=refuse_architecture,
    use="""\
```bash
llama-cli -m {folder}/model.gguf
```""",
)
