"""The tokenizer of a GGUF file as a `tokenizer.json`.

transformers reads tokens, merges and special tokens. Of the ways to split text before merges it knows some, and takes
another in silence where it does not know the file's; so the one that the file names is put in here.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qat.errors import ConfigError
from qat.models import reading, splits

MERGED_BYTES = "gpt2"  # what GGUF files call tokenizers that merge bytes: the only ones that split text before
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
Splits = tuple[dict[str, Any], bool]


def splits_of(gguf: Path, texts: dict[str, str]) -> Splits | None:
    """How the tokenizer in a file splits text: a pre-tokenizer, and whether words that are tokens stay whole.

    Args:
        gguf: the file.
        texts: its fields that are texts.

    Returns:
        None where its kind of tokenizer does not.

    Raises:
        ConfigError: the file does not say how, or names what is not known here.
    """
    name = texts.get("tokenizer.ggml.pre")
    if texts.get("tokenizer.ggml.model") != MERGED_BYTES:
        return None
    if name is None:
        raise ConfigError(
            f"{gguf} does not say how its tokenizer splits text (tokenizer.ggml.pre): take the tokenizer and weights of"
            " the model that it was made from (model=local model.path=<folder>)"
        )
    return splits.named(name)


def write(gguf: Path, found: Splits | None, folder: Path) -> None:
    """Writes the tokenizer of a file into a folder.

    Args:
        gguf: the file.
        found: how it splits text, of `splits_of`.
        folder: that of the model.

    Raises:
        ConfigError: transformers makes no tokenizer of it.
    """
    with reading.understood(f"the tokenizer in {gguf} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **reading.SAFE)
        (tokenizer if found is None else _splitting(tokenizer, *found)).save_pretrained(folder)


def _splitting(tokenizer: PreTrainedTokenizerBase, before: dict[str, Any], whole: bool) -> PreTrainedTokenizerBase:
    """A tokenizer that splits text so, of the class that takes it from its `tokenizer.json` as it is."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["pre_tokenizer"] = before
    described["model"]["ignore_merges"] = whole
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        **{name: getattr(tokenizer, name) for name in SPECIAL},
    )
    made.chat_template = tokenizer.chat_template
    return made
