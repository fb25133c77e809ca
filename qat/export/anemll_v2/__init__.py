"""The V2 state dict that the ANEMLL tool chain takes on, plain in fp32 or snapped to fp16.

Plain keeps unit-norm scales and magnitudes apart. Snapped multiplies the magnitudes into A, rounds
everything to fp16 and says so with its flag: what a Core ML conversion of that tool chain starts from.
`docs/FORMATS.md` describes both.
"""

from qat.config import ExportType
from qat.export.exporter import Exporter

EXPORTER = Exporter(
    types=(ExportType.fp32, ExportType.fp16),
    use="""\
`best_state_dict.pt` and `config.json` are what the ANEMLL V2 scripts load; this project reads them as
`checkpoint={folder}`.""",
)
