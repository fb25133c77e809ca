"""Code of the project as trees: each file is parsed once, whoever looks through it."""

import ast
from functools import cache
from pathlib import Path


@cache
def tree(file: Path) -> ast.Module:
    """A file as a tree; read only."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def nodes(file: Path) -> list[ast.AST]:
    """All nodes of a file."""
    return list(ast.walk(tree(file)))
