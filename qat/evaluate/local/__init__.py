"""Tasks for lm-eval that come with the package and need no network: plain questions, written for this project.

    cloze          the last word of a sentence, out of four
    choice         the answer to a question, out of four
    instructions   an answer as asked for, which `judge.py` can tell: so many lines, in capital letters, as JSON

A task is a YAML file with its rows beside it, `local_<name>` to the harness; `lm_eval --tasks <path of the YAML file>`
runs one as well.
"""

from importlib.resources import files

ALL = "local"
NAMES = ("local_cloze", "local_choice", "local_instructions")


def files_of(task: str) -> list[str]:
    """The YAML files of a task by its name, of all for `local`; another task stays as it is."""
    names = NAMES if task == ALL else (task,)
    if not set(names) <= set(NAMES):
        return [task]
    return [str(files("qat.evaluate.local") / f"{name.removeprefix('local_')}.yaml") for name in names]
