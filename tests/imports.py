"""What our files import, read from their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, but for those under `if TYPE_CHECKING`.

    `from a import b` gives `a` and `a.b`.
    """
    yield from _names(ast.parse(path.read_text(encoding="utf-8")), path)


def module_file(name: str) -> Path | None:
    """The file of one of our modules or packages, or None."""
    stem = ROOT / name.replace(".", "/")
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def _names(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = list(path.relative_to(ROOT).parent.parts) if path.is_relative_to(ROOT) else []
        base = package[: len(package) + 1 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for other in node.orelse:
            yield from _names(other, path)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _names(child, path)
