"""The rules of docs/architecture.md that a machine can hold us to."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.imports import imported, module_file
from tests.paths import ROOT

# Whom a room may import. Arrows go one way.
ROOMS = {"flows": {"flows", "tasks"}, "tasks": {"tasks", "deepclust"}, "deepclust": {"deepclust"}}
# Where a library may be imported: files, or whole folders.
DOORS = {
    "prefect": ("flows/",),
    "prefect_docker": ("flows/pools/",),
    "docker": ("flows/pools/",),
    "mlflow": ("tasks/shared/operations/tracking.py", "tasks/model/mlflow_model.py"),
    "dvc": ("tasks/shared/operations/processes/dvc_runner.py", "tasks/shared/operations/processes/repro.py"),
    "pydantic": ("deepclust/config.py", "tasks/shared/operations/params/", "flows/schema.py"),
    "ruamel": ("tasks/shared/operations/params/",),
    "torch.distributed": ("deepclust/distributed.py", "tasks/shared/operations/processes/launcher.py"),
    "faiss": ("deepclust/clustering/kmeans.py", "deepclust/clustering/neighbours.py"),
    "huggingface_hub": ("deepclust/models/hub.py",),
    "imagehash": ("deepclust/inspection/duplicates.py",),
    "torch": ("tasks/", "deepclust/"),
    "tifffile": ("deepclust/images/readers/tiff.py",),
    "imagecodecs": ("deepclust/images/readers/",),
    "pydicom": ("deepclust/images/readers/",),
    "timm": ("deepclust/models/backbones.py", "deepclust/training/optim.py"),
}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
# Who prints without `text.say`: that module itself, one of numbers alone, one that quotes as Python does, and a script
# whose lines dvc_runner.py passes on.
PRINTS = (
    "tasks/shared/operations/text.py",
    "tasks/shared/operations/observers/progress.py",
    "tasks/shared/outputs/environment.py",
    "tasks/shared/operations/processes/repro.py",
)
# How files are read that another stage may have written: in tasks/ only through `read`, but for what is named here.
READS = re.compile(r"\b(np\.load|open_memmap|json\.loads?|csv\.(Dict)?[rR]eader|load_file|safe_open|memmap)\(")
OTHER_FILES = {
    "flows/machines.py": "what the machines of this run wrote",
    "flows/pools/probe.py": "what a container prints",
    "flows/pools/registry.py": "what Prefect's server answers",
    "tasks/shared/outputs/read.py": "the door",
    "tasks/prepare/arrays.py": "arrays of this stage",
    "tasks/prepare/shares.py": "what another process of this stage found",
    "tasks/embed/__main__.py": "arrays of this stage",
    "tasks/adapt/__main__.py": "rows of this stage",
    "tasks/shared/operations/last_preparation.py": "DVC's cache; damage costs a warning",
    "tasks/shared/operations/outbox.py": "what is left to be tracked, which has marks of its own",
    "tasks/shared/operations/processes/dvc_runner.py": "what DVC prints",
    "tasks/shared/operations/processes/worker.py": "what a worker of this run wrote",
}
MOST_MODULES = 12
# Each file of these folders is one paper's, and all keep one contract, so their number says nothing.
IMPLEMENTATIONS = ("deepclust/methods", "deepclust/adaptation/adapters", "deepclust/clustering/algorithms")


def test_a_room_imports_only_from_rooms_below_it_and_a_library_through_its_door() -> None:
    for file in FILES:
        path = file.relative_to(ROOT)
        for name in imported(file):
            package = name.partition(".")[0]
            if package in {*ROOMS, "tests", "benchmarks"}:
                assert package in ROOMS[path.parts[0]], f"{path} imports {name}"
            for library, doors in DOORS.items():
                if f"{name}.".startswith(f"{library}."):
                    assert path.as_posix().startswith(doors), f"{path} imports {name}; allowed: {', '.join(doors)}"


def test_the_law_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b as c\nfrom d import e\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import f\n"
        "def late():\n    from g.h import (i, j)\n"
    )
    assert set(imported(file)) == {"a.b", "d", "d.e", "f", "g.h", "g.h.i", "g.h.j"}


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {}
    for file in FILES:
        needed = {module_file(name) for name in imported(file)} - {None, file}
        # A package's own __init__ is run before its modules, so it may import them.
        graph[file] = {other for other in needed if not (other.name == "__init__.py" and other.parent in file.parents)}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(str(file.relative_to(ROOT)) for file in error.args[1]))


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    for folder in {file.parent for room in (*ROOMS, "tests") for file in (ROOT / room).rglob("*.py")}:
        if folder.relative_to(ROOT).as_posix().removeprefix("tests/") not in IMPLEMENTATIONS:
            modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
            assert len(modules) <= MOST_MODULES, f"{folder.relative_to(ROOT)} has {len(modules)} modules"


def test_lines_for_the_terminal_are_printed_where_control_characters_and_passwords_are_taken_out() -> None:
    for file in FILES:
        path = file.relative_to(ROOT).as_posix()
        if not path.startswith(("deepclust/", *PRINTS)):
            assert not re.search(r"\bprint\(", file.read_text(encoding="utf-8")), f"{path}: use text.say or text.warn"


def test_files_between_the_stages_are_read_through_one_door() -> None:
    found = {file.relative_to(ROOT).as_posix() for file in FILES if READS.search(file.read_text(encoding="utf-8"))}
    assert {name for name in found if name.startswith(("tasks/", "flows/"))} == OTHER_FILES.keys()


def test_no_pickle_is_loaded() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text, file
        assert "weights_only=False" not in text, file
        assert not {"pickle", "joblib", "cloudpickle", "dill"}.intersection(imported(file)), file
