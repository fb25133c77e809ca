"""A dense Hugging Face folder: weights, tokenizer, chat template; transformers reads it without this package."""

from qat.config import ExportType
from qat.export.exporter import Exporter

EXPORTER = Exporter(
    types=tuple(ExportType),
    takes_teacher=True,
    adapts=True,
    merges=True,
    use="""\
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}")
```""",
)
