"""How a model is made to speak: asked through its chat template, or given a text to go on with."""

from transformers import PreTrainedTokenizerBase

from qat.data.thinking import chat_tokens
from qat.errors import ConfigError


def asked(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """A question through the chat template, up to where the answer begins.

    Raises:
        ConfigError: there is no template, or it refuses a plain question.
    """
    return chat_tokens(tokenizer, [{"role": "user", "content": question}], ask=True)


def takes_questions(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a chat template, and one that takes a plain question; a base model often has none."""
    try:
        return bool(asked(tokenizer, "?"))
    except ConfigError:
        return False


def begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A plain text to be continued, after the begin marker if there is one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]
