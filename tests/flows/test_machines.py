"""The machines of one stage: how they meet, and what becomes of the others when one ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows import machines
from flows.machines import Meeting
from tasks.shared.operations.processes.dvc_runner import Outcome, PreemptedStage, StageError
from tests.pipelines import eventually

# Machine 1's share: the stage's plain line, which takes this folder's module.
_SHARE = """
import json, os, sys, time
from pathlib import Path
Path("share").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
while Path("wait").exists():
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/embed.py").write_text(_SHARE)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("DEEPCLUST_ADDRESS", "127.0.0.1")
    monkeypatch.setattr(machines, "_POLL", 0.02)
    monkeypatch.setattr(machines, "_LAST", 0.5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class _Workspace:
    """Runs machine 0's share."""

    def __init__(self, run: Callable[[dict[str, str]], str]) -> None:
        self.run = run

    def run_stage(self, name: str, *, on_line: object, force: bool, env: dict[str, str]) -> Outcome:
        return Outcome(name, self.run(env), 1.0, {"dim": 3})


def _share(machine: int, run: Callable[[dict[str, str]], str] = lambda _: "run") -> Outcome:
    workspace: Any = _Workspace(run)
    how: dict[str, Any] = {"on_line": print, "force": False, "env": {"OURS": "1"}, "grace": 1.0}
    return Meeting("ab12", 2, machine).run(workspace, "embed@swav", **how)


def test_the_stage_runs_when_all_have_come_and_torchrun_is_told_one_place() -> None:
    came = threading.Event()
    seen: dict[str, str] = {}

    def lead(env: dict[str, str]) -> str:
        assert came.is_set(), "machine 0 waits"
        seen.update(env)
        assert eventually(Path("share").exists)
        return "run"

    with ThreadPoolExecutor() as pool:
        first = pool.submit(_share, 0, lead)
        time.sleep(0.2)
        came.set()
        second = pool.submit(_share, 1)
        assert (first.result().metrics, second.result().what) == ({"dim": 3}, "run")
    arguments, env = json.loads(Path("share").read_text())
    assert arguments == ["swav"]
    names = ("PET_NNODES", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_RDZV_ID", "OURS")
    assert [env[name] for name in names] == [seen[name] for name in names]
    assert (seen["PET_NODE_RANK"], env["PET_NODE_RANK"], seen["PET_NNODES"]) == ("0", "1", "2")
    assert seen["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("what", ["unchanged", "restored"])
def test_where_dvc_runs_nothing_the_others_end_at_once_and_well(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_LAST", 60.0)
    Path("wait").touch()
    with ThreadPoolExecutor() as pool:
        second = pool.submit(_share, 1)
        assert _share(0, lambda _: what).what == what
        assert second.result(20).what == what


def test_the_others_end_where_machine_0_fails() -> None:
    Path("wait").touch()

    def lead(_: dict[str, str]) -> str:
        raise StageError("embed@swav failed: damaged")

    with ThreadPoolExecutor() as pool:
        second = pool.submit(_share, 1)
        with pytest.raises(StageError, match="damaged"):
            _share(0, lead)
        with pytest.raises(StageError, match="machine 0 has ended its share"):
            second.result(20)


def test_a_share_that_is_lost_starts_again_while_machine_0_waits() -> None:
    starts: list[int] = []
    back = threading.Event()

    def run(machine: int) -> Outcome:
        starts.append(machine)
        if machine == 0:
            assert back.wait(20)
        elif starts.count(1) == 1:
            raise PreemptedStage("its machine is lost")
        else:
            back.set()
        return Outcome("embed@swav", "run", 1.0, {"machine": machine})

    assert machines.run_together(run, lambda _: None, 2, on_line=print).metrics == {"machine": 0}
    assert starts == [0, 1, 1]


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("stopped, because another process of this run failed; its own", "damaged", "damaged"),
        ("damaged", "machine 0 has ended its share of the stage", "damaged"),
        (None, "another version of the code", "another version of the code"),
    ],
)
def test_the_error_of_the_share_that_failed_itself_counts(first: str | None, second: str, told: str) -> None:
    cancelled = threading.Event()

    def run(machine: int) -> Outcome:
        if machine == 0 and first is None:  # waits for what never comes
            assert cancelled.wait(20)
            raise StageError("machine 0 has ended its share of the stage")
        raise StageError(str((first, second)[machine]))

    with pytest.raises(StageError, match=told):
        machines.run_together(run, lambda _: cancelled.set(), 2, on_line=print)
    assert cancelled.is_set() == (first is None)


def test_machine_0_that_is_lost_is_the_stage_that_is_lost() -> None:
    def run(machine: int) -> Outcome:
        raise PreemptedStage("lost") if machine == 0 else StageError("lost the others")

    with pytest.raises(PreemptedStage):
        machines.run_together(run, lambda _: None, 2, on_line=print)


def test_an_address_of_another_machine_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCLUST_ADDRESS", "192.0.2.1")
    with pytest.raises(StageError, match=r"DEEPCLUST_ADDRESS: expected an address of .*, got '192.0.2.1'; mend"):
        machines.address()
