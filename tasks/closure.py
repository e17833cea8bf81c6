"""The import closure of a stage, read from syntax trees: its hash, and the command that writes it into dvc.yaml.

python -m tasks.closure
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from tasks import layout

ROOT = Path(__file__).parent.parent
ROOMS = ("tasks", "deepclust")
# Where the closure stops: these never decide what a stage writes.
OBSERVERS = {
    "tasks/params.py": "has no defaults: every value stands in params.yaml, which DVC tracks by value",
    "tasks/sections.py": "the same",
    "tasks/pretrain_sections.py": "the same",
    "tasks/adapt_sections.py": "the same",
    "tasks/values.py": "the same",
    "tasks/tracking.py": "writes to MLflow only",
    "tasks/probe.py": "writes to MLflow only",
    "tasks/closure.py": "tells what decides",
    "tasks/launch.py": "decides where a stage runs and how it ends",
    "tasks/worker.py": "the same",
    "tasks/preemption.py": "decides when a run stops",
    "tasks/saved.py": "writes under state/ only; a run that goes on ends as if it had never stopped",
    "tasks/watch.py": "writes to MLflow, the terminal and state/ only, and can stop a run",
    "tasks/progress.py": "writes to the terminal only",
}
_DEP = re.compile(r"^ {6}- (?:tasks|deepclust)/\S+\n", re.MULTILINE)


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, but for those under `if TYPE_CHECKING`.

    `from a import b` gives `a` and `a.b`.
    """
    yield from _names(ast.parse(path.read_text(encoding="utf-8")), path)


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


def _files(name: str) -> Iterator[str]:
    """The files that importing a dotted name runs: the module's, and its packages'."""
    parts = name.split(".")
    if parts[0] not in ROOMS:
        return
    for length in range(1, len(parts) + 1):
        stem = "/".join(parts[:length])
        for file in (f"{stem}/__init__.py", f"{stem}.py"):
            if (ROOT / file).is_file():
                yield file


def _data(file: str) -> Iterator[str]:
    """The files beside a module that it reads, such as a template: `Path(__file__).with_name("report.html")`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for name in re.findall(r"""Path\(__file__\)\.with_name\(["']([^"']+)["']\)""", text):
        if (ROOT / file).with_name(name).is_file():
            yield Path(file).with_name(name).as_posix()


def closure(stage: str) -> list[str]:
    """Every file of the rooms that a stage's module imports, directly or not, in order of their names.

    Files beside a module that it reads belong to it. An empty `__init__.py` decides nothing and is left out.
    """
    found: set[str] = set()
    data: set[str] = set()
    waiting = list(_files(f"tasks.{stage}"))
    while waiting:
        file = waiting.pop()
        if file not in found and file not in OBSERVERS:
            found.add(file)
            waiting.extend(other for name in imported(ROOT / file) for other in _files(name))
            data.update(_data(file))
    return sorted(data.union(file for file in found if (ROOT / file).read_text(encoding="utf-8").strip()))


def code_hash(stage: str, *others: str) -> str:
    """SHA-256 of the names and contents of a stage's closure, and of other files."""
    found = hashlib.sha256()
    for file in [*closure(stage), *others]:
        content = (ROOT / file).read_bytes()
        found.update(f"{file} {len(content)}\n".encode() + content)
    return found.hexdigest()


def rewrite(text: str) -> str:
    """dvc.yaml with each stage's source files renewed; everything else stays as it is."""
    for stage in layout.STAGES:
        head = re.search(rf"^  {stage}:\n", text, re.MULTILINE)
        assert head, f"dvc.yaml has no stage {stage}"
        end = re.compile(r"^(?:  )?\S", re.MULTILINE).search(text, head.end())
        stop = end.start() if end else len(text)
        block = _DEP.sub("", text[head.end() : stop])
        files = "".join(f"      - {file}\n" for file in closure(stage))
        assert "    deps:\n" in block, f"stage {stage} of dvc.yaml has no deps"
        text = text[: head.end()] + block.replace("    deps:\n", f"    deps:\n{files}", 1) + text[stop:]
    return text


def main() -> None:
    """Renew the source files among the deps of dvc.yaml."""
    path = ROOT / "dvc.yaml"
    text = path.read_text(encoding="utf-8")
    renewed = rewrite(text)
    if renewed != text:
        path.write_text(renewed, encoding="utf-8")
    print("dvc.yaml renewed" if renewed != text else "dvc.yaml is as it should be")


if __name__ == "__main__":
    main()
