"""No default of the process decides what a number is: every tensor names its type, all chance its generator.

Loading a model sets the default type of the whole process for a while, also for threads that draw numbers.
`tests/test_pipeline.py` shows the same of a whole run; here is what no run on a CPU comes by.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qat"
TYPED = {"rand", "randn", "zeros", "ones", "empty", "full", "linspace", "eye"}
DRAWN = {"rand", "randn", "randint", "randperm"}
BY_LOADING = {("packed/linear.py", "zeros")}  # a bias, of the type that a model is loaded in


def calls():
    """Calls of torch's functions that make tensors: file, line, name, keywords."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                where = path.relative_to(PACKAGE).as_posix()
                yield where, node.lineno, node.func.attr, {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize(("names", "keyword", "but"), [(TYPED, "dtype", BY_LOADING), (DRAWN, "generator", set())])
def test_nothing_is_left_to_a_default(names, keyword, but):
    found = [call for call in calls() if call[2] in names]
    assert len(found) >= 5
    assert [call[:3] for call in found if keyword not in call[3] and (call[0], call[2]) not in but] == []
