"""Evaluation of students.

figures.py    KL, KD loss, perplexity and agreement on rows of tokens
positions.py  the same KL against the position in a document
intervals.py  what chance may make of a mean over rows
windows.py    a long text as windows in which each token is scored once
answers.py    what models say: sample prompts, and streams for a conversation
free.py       many prompts answered by each model, and how their answers differ
tasks.py      the tasks of lm-eval, which is an extra
local/        tasks of the package's own for it
"""

from qat.evaluate.answers import answers, samples_of
from qat.evaluate.figures import Comparison, Metrics, compare, evaluate

__all__ = ["Comparison", "Metrics", "answers", "compare", "evaluate", "samples_of"]
