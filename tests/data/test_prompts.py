"""The project's own prompt list."""

from qat.config import DataConfig, DataSource
from qat.data.texts import prompts

PROMPTS = prompts(DataConfig(name="prompts", source=DataSource.selfgen))


def test_there_are_enough_prompts_for_the_option():
    assert len(PROMPTS) >= 256  # conf/data/prompts.yaml asks for so many


def test_no_prompt_comes_twice():
    assert len({" ".join(prompt.casefold().split()) for prompt in PROMPTS}) == len(PROMPTS)


def test_prompts_are_trimmed_single_lines_without_the_comments():
    assert all(prompt and prompt == prompt.strip() and not prompt.startswith("#") for prompt in PROMPTS)


def test_prompts_of_evaluation_samples_are_not_trained_on():
    from qat.evaluate.answers import SAMPLE_PROMPTS

    assert not set(SAMPLE_PROMPTS) & set(PROMPTS)
