"""One file for llama.cpp: weights on its own grids as they are, with all it needs to answer a chat."""

from typing import TYPE_CHECKING

from qat.config import ExportType
from qat.export.exporter import Exporter
from qat.export.gguf.families import refuse_architecture
from qat.export.gguf.types import Types

if TYPE_CHECKING:
    from qat.models import ModelFolder

FILE = "model.gguf"


def refuse_tokenizer(teacher: "ModelFolder") -> None:
    """Looks whether llama.cpp makes of text what the tokenizer of a model does.

    Raises:
        ConfigError: it does not, or nobody knows here.
    """
    from qat.export.gguf import vocabulary

    vocabulary.check(teacher)


EXPORTER = Exporter(
    types=tuple(ExportType),
    library="gguf",
    takes_teacher=True,
    grid=Types(),
    writes_out=True,
    refuse_architecture=refuse_architecture,
    refuse_tokenizer=refuse_tokenizer,
    use="""\
```bash
llama-cli -m {folder}/model.gguf
```""",
)
