"""How tokenizers split text before they merge bytes, by llama.cpp's names for it.

llama.cpp has each way in code (`llama_vocab::impl::load` in `src/llama-vocab.cpp`), and a GGUF file says which one by a
name in `tokenizer.ggml.pre`. A `tokenizer.json` describes it, in steps.
"""

import json
from typing import Any

from qat.errors import ConfigError
from qat.suggest import did_you_mean

Step = tuple[str, Any]

BEFORE = r"[^\r\n\p{L}\p{N}]?"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SIGNS, SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _words(numbers: str) -> str:
    return f"{ENDINGS}|{BEFORE}\\p{{L}}+|{numbers}|{SIGNS}|{SPACES}"


def _cased(numbers: str, endings: str = "") -> str:
    """Words that a change from small to capital letters ends as well."""
    words = f"{BEFORE}{UPPER}*{LOWER}+{endings}|{BEFORE}{UPPER}+{LOWER}*{endings}"
    return f"{words}|{numbers}|{SIGNS_AND_SLASHES}|{SPACES}"


def _split(pattern: str) -> tuple[Step, ...]:
    return ("split", pattern), ("bytes", False)


STEPS: dict[str, tuple[Step, ...]] = {
    "gpt-2": (("bytes", True),),
    "smollm": (("digits", True), ("bytes", True)),
    "qwen2": _split(_words(r"\p{N}")),
    "qwen35": _split(rf"{ENDINGS}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"),
    "llama-bpe": _split(_words(r"\p{N}{1,3}")),
    "dbrx": _split(_words(r"\p{N}{1,3}")),
    "gpt-4o": _split(_cased(r"\p{N}{1,3}", f"{ENDINGS}?")),
    "tekken": _split(_cased(r"\p{N}")),
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # names that also say that a word which is a token is taken whole, not merged
SAME = {  # other names for the same splits
    "gpt-2": ("phi-2", "olmo", "mpt", "exaone4", "mellum", "trillion", "granite-docling"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
}
NAMES = {name: name for name in STEPS} | {other: name for name, others in SAME.items() for other in others}


def named(name: str) -> tuple[dict[str, Any], bool]:
    """The pre-tokenizer of a `tokenizer.json` that llama.cpp calls so, and whether words that are tokens stay whole.

    Raises:
        ConfigError: none is known here by this name.
    """
    if name not in NAMES:
        raise ConfigError(
            f"nothing here knows how text is split that llama.cpp calls {name}{did_you_mean(name, NAMES)}: take the"
            " tokenizer and weights of the model that the file was made from (model=local model.path=<folder>)"
        )
    each = [_described(step) for step in STEPS[NAMES[name]]]
    whole = NAMES[name] in WHOLE_WORDS
    return (each[0] if len(each) == 1 else {"type": "Sequence", "pretokenizers": each}), whole


def name_of(found: tuple[Step, ...], whole: bool) -> str | None:
    """llama.cpp's name for some steps; of two, the one that takes words that are tokens whole, or does not."""
    same = [name for name, each in STEPS.items() if each == found]
    return next((name for name in same if (name in WHOLE_WORDS) == whole), same[0] if same else None)


def steps(described: Any) -> tuple[Step, ...]:
    """What a pre-tokenizer of a `tokenizer.json` does, step after step."""
    match described:
        case {"type": "Sequence", "pretokenizers": [*each]}:
            return tuple(step for one in each for step in steps(one))
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (("bytes", bool(described.get("use_regex", True))),)
        case {"type": "Digits", "individual_digits": alone}:
            return (("digits", alone),)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (("split", pattern),)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return (("split", pattern),)
    return (("other", json.dumps(described)),)


def _described(step: Step) -> dict[str, Any]:
    match step:
        case ("bytes", words):
            return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
        case ("digits", alone):
            return {"type": "Digits", "individual_digits": alone}
    return {"type": "Split", "pattern": {"Regex": step[1]}, "behavior": "Isolated", "invert": False}
