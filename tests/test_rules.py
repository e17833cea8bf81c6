"""The rules of docs/architecture.md that a machine can hold us to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import layout, params, values
from tasks.closure import OBSERVERS, ROOT, closure, imported, rewrite

# Whom a room may import. Arrows go one way.
ROOMS = {
    "flows": {"flows", "tasks"},
    "tasks": {"tasks", "deepclust"},
    "deepclust": {"deepclust"},
}
# Where a library may be imported: a file, or a whole room.
DOORS = {
    "prefect": ("flows/", "tasks/run.py"),
    "mlflow": ("tasks/tracking.py", "tasks/model.py"),
    "dvc": ("tasks/run.py",),
    "yaml": ("tasks/params.py",),
    "pydantic": (
        *("tasks/params.py", "tasks/sections.py", "tasks/pretrain_sections.py", "tasks/adapt_sections.py"),
        "tasks/values.py",
    ),
    "ruamel": ("tasks/overrides.py",),
    "torch.distributed": ("deepclust/distributed.py", "tasks/launch.py"),
    "faiss": ("deepclust/kmeans.py",),
    "torch": ("tasks/", "deepclust/"),
    "timm": ("deepclust/backbones.py",),
}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for name in imported(file):
            package = name.partition(".")[0]
            if package in {*ROOMS, "tests", "benchmarks"}:
                assert package in ROOMS[room], f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_through_its_door_only(library: str) -> None:
    for file in FILES:
        path = file.relative_to(ROOT).as_posix()
        if any(_within(name, library) for name in imported(file)):
            assert path.startswith(DOORS[library]), f"{path} imports {library}; allowed: {', '.join(DOORS[library])}"


def test_the_law_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b as c\nfrom d import e\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import f\n"
        "def late():\n    from g.h import (i, j)\n"
    )
    assert set(imported(file)) == {"a.b", "d", "d.e", "f", "g.h", "g.h.i", "g.h.j"}


@pytest.mark.parametrize("stage", layout.STAGES)
def test_a_stages_deps_are_its_import_closure(stage: str) -> None:
    stages = params.read(ROOT / "dvc.yaml")["stages"]
    stated = {dep for dep in stages[stage]["deps"] if isinstance(dep, str) and dep.startswith(("tasks/", "deepclust/"))}
    assert stated == set(closure(stage)), "run `make deps`"


def test_the_closure_follows_imports_and_stops_at_observers() -> None:
    assert "tasks/layout.py" in closure("prepare")
    assert "deepclust/sinkhorn.py" in closure("pretrain")
    assert "deepclust/metrics.py" not in closure("pretrain"), "changing an evaluation metric must not retrain"
    assert not set(OBSERVERS).intersection(file for stage in layout.STAGES for file in closure(stage))


def test_rewriting_the_deps_changes_nothing_else() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    spoilt = "".join(
        line for line in text.splitlines(True) if not line.startswith(("      - tasks/", "      - deepclust/"))
    )
    assert rewrite(spoilt) == rewrite(text)
    assert params.read(ROOT / "dvc.yaml")["stages"].keys() == set(layout.STAGES)


def test_every_observer_exists() -> None:
    assert [file for file in OBSERVERS if not (ROOT / file).is_file()] == []


def test_no_parameter_has_a_default() -> None:
    kinds = [values.Section]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    for section in kinds:
        for name, info in section.model_fields.items():
            assert info.is_required(), f"{section.__name__}.{name} has a default; state its value in params.yaml"


def test_no_pickle_is_loaded() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text, file
        assert "weights_only=False" not in text, file
        assert not {"pickle", "joblib", "cloudpickle", "dill"}.intersection(imported(file)), file
