"""Teachers: found or made, looked at, and loaded by one piece of code.

Whatever the source (a GGUF file in a Python package, the hub, a folder, a tiny model made on the
spot) and whatever lies there (quantized weights, a model of text and pictures), everything downstream
sees a folder with `config.json`, plain weights of a causal language model and, mostly, a tokenizer, and a
fingerprint that changes when the weights do.
"""

import transformers

from qat.models.folder import ModelFolder, generate
from qat.models.pairing import fitted, pair, teaching
from qat.models.reading import read
from qat.models.sources import at_hand, described, locate, made_before, whereabouts

__all__ = [
    "ModelFolder",
    "at_hand",
    "described",
    "fitted",
    "generate",
    "locate",
    "made_before",
    "pair",
    "read",
    "teaching",
    "whereabouts",
]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
