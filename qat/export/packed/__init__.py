"""Bit-packed weights of any format for transformers: what a student weighs on disk is what its bits per weight say.

`qat.packed` is the side that reads it; `docs/FORMATS.md` describes it.
"""

from qat.config import ExportType
from qat.export.exporter import Exporter

EXPORTER = Exporter(
    types=tuple(ExportType),
    sized=True,
    writes_out=True,
    adapts=True,
    use="""\
```python
import qat  # pip install qat-speedrun; registers the format with transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}")  # device_map="cuda" keeps it packed on the GPU
```""",
)
