"""Imported where launches are forked from: what every one of them would read and parse first, once for all."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from qat.cli import arguments, main
from tests import composing

composing.once()
for words in ([], ["+debug=tiny", "train.lr=1e-3"]):
    main.check(arguments.parse(words))
get_checkpoint_conversion_mapping("llama")
gc.collect()
gc.freeze()  # what is there already is garbage of no launch, and looking for some would copy its memory
