"""No default of the process decides what a number is: every tensor names its type, all chance its generator.

Loading a model sets the default type of the whole process for a while, also for threads that draw numbers.
`tests/test_windows.py` shows the same of a whole run; here is what no run on a CPU comes by.
"""

import ast
import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qat.models import reading
from tests import parsed

PACKAGE = Path(__file__).parents[1] / "qat"
TYPED = {"rand", "randn", "zeros", "ones", "empty", "full", "linspace", "eye"}
DRAWN = {"rand", "randn", "randint", "randperm"}
BY_LOADING = {("packed/linear.py", "zeros")}  # a bias, of the type that a model is loaded in


def calls():
    """Calls of torch's functions that make tensors: file, line, name, keywords."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in parsed.nodes(path):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                where = path.relative_to(PACKAGE).as_posix()
                yield where, node.lineno, node.func.attr, {keyword.arg for keyword in node.keywords}


def held(node, lock=False):
    """Every call below a node that makes a model of transformers: its line, and whether the lock is held there."""
    if isinstance(node, ast.With):
        lock = lock or any(ast.unparse(item.context_expr).endswith("LOADING") for item in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        is_model = not ast.unparse(node.func).startswith(("AutoConfig", "AutoTokenizer"))
        if node.func.attr in ("from_pretrained", "from_config") and is_model:
            yield node.lineno, lock
    for inside in ast.iter_child_nodes(node):
        yield from held(inside, lock)


def test_models_are_made_one_after_the_other():
    found = [(path.name, *call) for path in sorted(PACKAGE.rglob("*.py")) for call in held(parsed.tree(path))]
    assert len(found) == 5 and [call for call in found if not call[-1]] == []


def test_two_models_at_once_leave_the_default_type_as_it_was(teacher):
    config, before = copy.deepcopy(teacher.skeleton().config), torch.get_default_dtype()
    config.dtype = torch.bfloat16

    def make(number):
        return reading.skeleton(config, teacher.path) if number % 2 else reading.read(teacher.path, torch.float16)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, range(16)))
    assert torch.get_default_dtype() is before
    assert {next(model.parameters()).dtype for model in made[::2]} == {torch.float16}


@pytest.mark.parametrize(("names", "keyword", "but"), [(TYPED, "dtype", BY_LOADING), (DRAWN, "generator", set())])
def test_nothing_is_left_to_a_default(names, keyword, but):
    found = [call for call in calls() if call[2] in names]
    assert len(found) >= 5
    assert [call[:3] for call in found if keyword not in call[3] and (call[0], call[2]) not in but] == []
