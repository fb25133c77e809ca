"""Imported where launches are forked from: what every one of them would read and parse first, once for all."""

import weakref

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from qat import system
from qat.cli import arguments, main
from tests import composing

OFTEN = (  # options that launches of tests choose together, of which Hydra's own work is done here for all of them
    (),
    ("+debug=tiny",),
    ("+debug=tiny", "quant=q2a16"),
    ("+debug=tiny", "mode=e2e"),
    ("+debug=tiny", "mode=lora"),
    ("+debug=tiny", "data=prompts", "mode=e2e"),
)

composing.once()
for words in OFTEN:
    main.check(arguments.parse([*words, "train.lr=1e-3"]))
main.check(arguments.parse([]))
get_checkpoint_conversion_mapping("llama")
for undone in list(weakref.finalize._registry):  # type: ignore[attr-defined]
    undone.atexit = False  # such as names that torch knows operations by: of what ends anyway, at 50 ms a launch
system.keep()  # what is there already is garbage of no launch, and looking for some would copy its memory
