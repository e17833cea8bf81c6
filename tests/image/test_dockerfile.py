"""What can be said of the image without building it: `make image` builds it and tries the rest."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.imports import imported
from tests.paths import ROOT

DOCKERFILE = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M))
HEAD, *STAGES = re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)
BUILDER, LAST = STAGES
EXTRAS = re.findall(r"--extra (\S+)", BUILDER)
# deepclust/images/formats.py looks for the first before it is imported; the others are of who starts containers.
OPTIONAL = {"pillow_heif", "prefect_docker", "docker"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_both_stages_begin_with_the_base_image_of_the_build_argument() -> None:
    assert "ARG BASE_IMAGE=python:3.11-slim-bookworm" in HEAD
    assert [stage.split("\n")[0].split(" AS ")[0] for stage in STAGES] == ["FROM ${BASE_IMAGE}"] * 2


def test_the_last_user_is_a_number_other_than_roots() -> None:
    user = re.findall(r"^USER (.*)$", LAST, re.MULTILINE)[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), user


def test_the_last_stage_installs_git_only_and_takes_the_libraries_alone_from_the_first() -> None:
    assert re.findall(r"\binstall (?:-y |--no-install-recommends )*(?!-d)(\S+)", LAST) == ["git"]
    assert re.findall(r"^COPY --from=builder (.*)$", LAST, re.MULTILINE) == ["/opt/venv /opt/venv"]


def test_a_change_of_code_or_commit_installs_nothing_again() -> None:
    assert re.findall(r"^(?:COPY|ADD|ARG) (.*)$", BUILDER, re.MULTILINE) == [
        "PINS=requirements.lock",
        "INDEX",
        "pyproject.toml requirements-cpu.in ${PINS} /opt/",
    ]
    assert LAST.index("COPY --from=builder") < LAST.index("\nCOPY . .") < LAST.index("\nARG COMMIT")


def test_every_dependency_is_checked_against_the_hashes_of_the_lock() -> None:
    (install,) = re.findall(r"uv pip install .*", BUILDER)
    assert "--require-hashes" in install
    assert "--constraint /opt/${PINS} -r /opt/pyproject.toml" in install


def test_any_engine_can_build_it() -> None:
    assert "RUN --mount" not in DOCKERFILE
    assert "<<" not in DOCKERFILE


def test_an_image_holds_every_library_that_the_code_imports_but_the_optional_one() -> None:
    inside = _installed()
    assert inside.isdisjoint({"mypy", "ruff", "pytest", "playwright", "prefect-docker"})
    assert "pillow-heif" not in inside
    rooms = ("deepclust", "tasks", "flows")
    providers = {name: names for name, names in metadata.packages_distributions().items() if name not in rooms}
    missing = []
    for room in rooms:
        for file in (ROOT / room).rglob("*.py"):
            for name in {name.partition(".")[0] for name in imported(file)} - OPTIONAL:
                if name in providers and inside.isdisjoint(map(canonicalize_name, providers[name])):
                    missing.append(f"{file.relative_to(ROOT)} imports {name}")
    assert missing == []


def _installed() -> set[str]:
    """Names of all packages in the image: what pyproject.toml asks for with the extras, and what these need in turn."""
    extras = [PROJECT["optional-dependencies"][extra] for extra in EXTRAS]
    todo = [Requirement(line) for lines in [PROJECT["dependencies"], *extras] for line in lines]
    found: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in found:
            continue
        found.add(key)
        for line in metadata.requires(wanted.name) or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *wanted.extras}):
                needed.marker = None
                todo.append(needed)
    return {name for name, _ in found}
