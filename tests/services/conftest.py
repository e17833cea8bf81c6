"""What the tests with a container engine share: the engine, the image, workspaces, and one that is served.

engine       the engine: `client` of its Docker API, `environment` by which programs find it
image        the name of the repository's image, in which the locked dependencies are installed
make_workspace(*edits)                a new small workspace, with edits of its params.yaml
serving(root, *options, **variables)  context manager: `make serve` in a workspace, with the engine in its environment
docker_served                         a small workspace that is served with the Docker pool, the same for all tests
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.services import engine as engines
from tests.services import serving as served
from tests.services import workspaces


@pytest.fixture(scope="session")
def engine() -> Iterator[engines.Engine]:
    try:
        with engines.running() as found:
            yield found
    except engines.EngineError as error:
        pytest.exit(f"error: {error}", returncode=2)


@pytest.fixture(scope="session")
def image(engine: engines.Engine) -> str:
    try:
        return engines.image(engine)
    except engines.EngineError as error:
        pytest.exit(f"error: {error}", returncode=2)


@pytest.fixture(scope="session")
def make_workspace(engine: engines.Engine) -> Iterator[Callable[..., Path]]:
    with workspaces.folder(engine.client) as folder:
        numbers = itertools.count()
        yield lambda *edits: workspaces.make(folder / f"workspace{next(numbers)}", *edits)


@pytest.fixture
def workspace(make_workspace: Callable[..., Path]) -> Path:
    return make_workspace()


@pytest.fixture(scope="session")
def serving(engine: engines.Engine) -> Callable[..., AbstractContextManager[served.Served]]:
    @contextmanager
    def serve(root: Path, *options: str, **variables: str) -> Iterator[served.Served]:
        with served.serving(root, *options, **engine.environment, **variables) as found:
            yield found

    return serve


@pytest.fixture(scope="session")
def docker_served(
    image: str, make_workspace: Callable[..., Path], serving: Callable[..., AbstractContextManager[served.Served]]
) -> Iterator[served.Served]:
    with serving(make_workspace(), "--docker", "--image", image) as found:
        yield found


_begin = time.monotonic()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"services: {(time.monotonic() - _begin) / 60:.1f} minutes")
