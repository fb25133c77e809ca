"""Tokenizers off the disk: whole, of the model's vocabulary, and with a token to pad with."""

from pathlib import Path

from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qat import model_files
from qat.errors import ConfigError, reason
from qat.models.reading import SAFE, understood

SENTENCE = "The sea is calm today."


def load(folder: Path, ends: tuple[int, ...] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, padding on the left as generation needs.

    Args:
        folder: with its files.
        ends: of the model's texts, of which the first that the tokenizer has ends text where it names no end
            of its own. Where it names nothing to pad with it pads with that, else with its first token:
            what is padded never counts.

    Raises:
        ConfigError: there is none, it needs code of its own, or its files cannot be read.
    """
    if not model_files.has_tokenizer(folder):
        raise ConfigError(f"{folder} has no tokenizer, which text needs: put the tokenizer's files there")
    settings = folder / model_files.TOKENIZER_CONFIG
    model_files.refuse_code(model_files.read(settings), settings)
    found = _read(folder)
    end = next((token for token in map(found.convert_ids_to_tokens, ends) if token is not None), None)
    if found.eos_token is None and end is not None:
        found.eos_token = end
    if found.pad_token is None:
        found.pad_token = found.eos_token or found.convert_ids_to_tokens(0)
    return found


def check(folder: Path, found: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Looks whether a tokenizer goes with a model.

    Raises:
        ConfigError: it has tokens that the model does not know, makes nothing of a sentence, or ends text
            with a token that its vocabulary lacks.
    """
    last = max(found.get_vocab().values(), default=-1)
    if last >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder} has tokens up to number {last} ({found.convert_ids_to_tokens(last)}) and the"
            f" model knows {vocab_size}: take the model's own tokenizer, or resize its embeddings"
            " (resize_token_embeddings)"
        )
    with understood(f"the tokenizer of {folder} cannot be used"):
        ids = found(SENTENCE, add_special_tokens=False)["input_ids"]
    if not ids or set(ids) == {found.unk_token_id}:
        raise ConfigError(f"the tokenizer of {folder} makes nothing of a sentence: its vocabulary is missing")
    for name in ("bos_token", "eos_token"):
        token = getattr(found, name)
        if token is not None and not _known(folder, str(token)):
            raise ConfigError(
                f"the tokenizer of {folder} names {token} as its {name}, and its vocabulary has no such token:"
                f" mend {model_files.TOKENIZER_CONFIG}"
            )


def _read(folder: Path) -> PreTrainedTokenizerBase:
    what = f"the tokenizer of {folder} cannot be read"
    try:
        with understood(what):
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left", **SAFE)
    except Exception as error:
        if type(error) is not Exception:  # the package tokenizers raises plain `Exception`, never a subclass
            raise
        raise ConfigError(f"{what} ({reason(error)})") from None
    if not isinstance(getattr(found, "backend_tokenizer", None), Fast):
        raise ConfigError(
            f"{what}: a {type(found).__name__} is none of the package tokenizers; save it with a tokenizer.json"
        )
    return found


def _known(folder: Path, token: str) -> bool:
    """Whether the files know a token: transformers adds those that they only name."""
    path = folder / "tokenizer.json"
    if not path.is_file() or Fast.from_file(str(path)).token_to_id(token) is not None:
        return True
    listed = model_files.read(folder / model_files.TOKENIZER_CONFIG).get("added_tokens_decoder")
    added = [entry.get("content") for entry in listed.values()] if isinstance(listed, dict) else []
    return token in added or token in model_files.read(folder / "added_tokens.json")
