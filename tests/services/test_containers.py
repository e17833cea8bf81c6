"""Each stage a container: the same results, killed and cancelled, refused, and side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks import kill_test
from tests.pipelines import eventually
from tests.services import workspaces
from tests.services.engine import Engine
from tests.services.serving import Served

_DOCKER = "pretrain-and-eval/docker"
_TRAINING = {"stages": ["pretrain"], "encoders": ["swav"]}
_EPOCH = 10  # updates of an epoch, so that the first checkpoints, every 3 updates, are in the middle of one


@pytest.fixture
def served(docker_served: Served, engine: Engine) -> Served:
    """The workspace that is served, as it was in the beginning."""
    _expect_no_container(engine, docker_served.root)
    workspaces.reset(docker_served.root)
    return docker_served


def _expect_no_container(engine: Engine, root: Path) -> None:
    """The containers of a workspace are gone within 15 s."""
    assert eventually(lambda: not workspaces.containers(engine.client, root), 15)


def _training(served: Served, epochs: int) -> str:
    """Start a run that trains in a container, and return it, in mid-epoch, once it has saved its state."""
    edits = ["pretrain.swav.batch_size=8", f"pretrain.swav.epochs={epochs}"]
    number = served.start(_DOCKER, **_TRAINING, overrides=edits)
    assert eventually(lambda: kill_test.newest(served.root, "swav") > 0 or served.has_ended(number), 900)
    assert not served.has_ended(number), served.logs(number)
    return number


def _locked(root: Path) -> dict[str, Any]:
    """What DVC has recorded of each stage: hashes of all that it read and wrote."""
    recorded: dict[str, Any] = YAML(typ="safe").load(root / "dvc.lock")["stages"]
    return recorded


def test_the_graph_with_a_container_for_each_stage_leaves_the_same_lock_as_processes(
    served: Served, engine: Engine
) -> None:
    one = {"overrides": ["encoders=[swav]"]}  # the same stages for another encoder would take minutes more
    here = served.ended(served.start("pretrain-and-eval/local", **one))
    assert here["state"]["type"] == "COMPLETED", served.logs(here["id"])
    expected = _locked(served.root)
    assert len(expected) == 8, "sizes, prepare, report, and five of the encoder"
    before = {run["id"] for run in served.stages()}
    workspaces.reset(served.root)

    run = served.ended(served.start(_DOCKER, **one))
    assert run["state"]["type"] == "COMPLETED", served.logs(run["id"])
    assert _locked(served.root) == expected
    stages = [run for run in served.stages() if run["id"] not in before]
    assert sorted(run["parameters"]["name"] for run in stages) == sorted(expected)
    _expect_no_container(engine, served.root)
    owners = {path.stat().st_uid for path in (served.root / "artifacts").rglob("*")}
    assert owners == {workspaces.USER}


def test_a_container_killed_in_mid_epoch_is_followed_by_another_that_ends_bit_for_bit(
    served: Served, engine: Engine
) -> None:
    before = {run["id"] for run in served.stages()}
    number = _training(served, epochs=12)
    container = next(iter(workspaces.containers(engine.client, served.root)))
    container.kill("SIGKILL")
    step = kill_test.newest(served.root, "swav")
    run = served.ended(number)
    assert run["state"]["type"] == "COMPLETED", served.logs(number)
    killed, following = [run for run in served.stages() if run["id"] not in before][-2:]
    assert (killed["state"]["type"], following["state"]["type"]) == ("CRASHED", "COMPLETED")
    resumed = re.search(r"goes on after update (\d+)", served.logs(following["id"]))
    assert resumed, served.logs(following["id"])
    assert 0 < int(resumed[1]) <= step
    assert f"{_EPOCH} steps" in served.logs(following["id"])
    assert int(resumed[1]) % _EPOCH, "it was not killed in mid-epoch; try again"
    after = _locked(served.root)["pretrain@swav"]

    edited = (served.root / "params.yaml").read_bytes()
    workspaces.reset(served.root)
    (served.root / "params.yaml").write_bytes(edited)
    workspaces.run(served.root, "python", "-m", "dvc", "repro", "pretrain@swav")
    assert _locked(served.root)["pretrain@swav"] == after


def test_a_second_run_is_refused_in_a_line_and_cancelling_in_mid_epoch_leaves_no_container(
    served: Served, engine: Engine
) -> None:
    before = {run["id"] for run in served.stages()}
    number = _training(served, epochs=2000)
    second = served.ended(served.start(_DOCKER, **_TRAINING))
    assert second["state"]["type"] == "FAILED"
    message = second["state"]["message"]
    assert message.startswith("expected to be the only flow in"), message
    assert "\n" not in message
    assert served.run(number)["state"]["type"] == "RUNNING"

    served.cancel(number)
    _expect_no_container(engine, served.root)
    assert served.ended(number, 30)["state"]["type"] == "CANCELLED"
    ended = [served.ended(run["id"], 30) for run in served.stages() if run["id"] not in before]
    assert ended[-1]["state"]["type"] == "CANCELLED"
    assert not (served.root / "artifacts/pretrain/swav").exists()


def test_isolated_runs_work_side_by_side_and_leave_the_workspace_as_it_is(served: Served) -> None:
    params = (served.root / "params.yaml").read_bytes()
    edits = [["pretrain.swav.temperature=0.2"], ["pretrain.swav.temperature=0.3"]]
    numbers = [served.start(_DOCKER, **_TRAINING, overrides=edit, isolated=True) for edit in edits]
    runs = [served.ended(number) for number in numbers]
    for run in runs:
        assert run["state"]["type"] == "COMPLETED", served.logs(run["id"])
    assert max(run["start_time"] for run in runs) < min(run["end_time"] for run in runs)
    assert (served.root / "params.yaml").read_bytes() == params
    assert not (served.root / "dvc.lock").exists()
    results = [_locked(lock.parent)["pretrain@swav"]["outs"] for lock in served.root.glob("state/isolated/*/dvc.lock")]
    assert len(results) == 2
    assert results[0] != results[1]
