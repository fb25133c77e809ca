"""What is asked of a finished student: figures, and conversation."""

from dataclasses import dataclass

from qat.config.keys import HOT, key

WINDOW = 2048  # tokens of a window of text where neither a person nor the model asks for fewer


@dataclass
class EvaluateConfig:
    """What is measured, of which models, and on what; all but `sample_tokens` go with stage=evaluate."""

    sample_tokens: int = key(48, "longest sample answer", low=1)
    against: list[str] = key([], "further models: teacher, runs (SR-001), registered names, paths")
    text: str | None = key(None, "a text file that is measured on, in sliding windows; null takes the cache")
    context: int | None = key(
        None, f"text: tokens of a window; null takes {WINDOW}, or what the model was made for", low=2
    )
    stride: int | None = key(
        None, "text: tokens between the beginnings of two windows; null puts them side by side", low=1
    )
    tokens: int | None = key(None, "text: at most so many tokens of the file; null takes all", low=2)
    tasks: list[str] = key(
        [], "of lm-eval, by name or YAML file, instead of the cache; local takes the package's own, offline"
    )
    examples: int | None = key(None, "tasks: at most so many examples of each; null takes all", low=1)
    chat: bool | None = key(None, "tasks: through the chat template; null does where there is one")
    fewshot: int | None = key(None, "tasks: examples shown before a question; null takes what each says", low=0)
    answers: int | None = key(
        None, "so many of the package's prompts are answered by each, greedy and drawn, side by side", low=1, high=200
    )
    answer_tokens: int = key(128, "answers: tokens of the longest", low=1)

    @property
    def apart(self) -> bool:
        """Whether it measures on anything but a cache."""
        return bool(self.text or self.tasks or self.answers)


@dataclass
class ChatConfig:
    """`stage=chat`."""

    prompt: str | None = key(None, "one question, answered at once; null opens a conversation", prose=True)
    max_tokens: int = key(256, "longest answer", low=1)
    temperature: float = key(0.0, "0 always takes the most likely token", low=0, high=HOT)
    thinking: bool = key(False, "the chat template's own switch")
    teacher: bool = key(False, "the teacher answers as well, before the checkpoint")
