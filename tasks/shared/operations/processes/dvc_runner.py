"""Runs stages through DVC, which holds the graph and decides what has changed. Only this and repro.py import it.

with Workspace() as workspace:
    for stage in workspace.select(["embed"], ["swav"]):
        workspace.run_stage(stage, on_line=print)
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import IO, Any

from deepclust.errors import DataError
from deepclust.errors import DeepclustError as DeepclustError
from deepclust.errors import StageError as StageError
from tasks.shared.operations import params
from tasks.shared.operations.params import schema
from tasks.shared.operations.processes import child_processes, gpus, repro
from tasks.shared.operations.text import safe
from tasks.shared.outputs import environment, layout, read

LOCK = layout.STATE / "flow.lock"
TAIL = 20  # lines of a failed stage's output that are shown
_OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")  # name of a file in DVC's cache
_STATUS = (sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json")
_REPRO = (sys.executable, "-P", repro.__file__)


@dataclass(frozen=True)
class Outcome:
    """Result of bringing a stage up to date.

    Attributes:
        stage: Name as in DVC, such as `embed@swav`.
        what: `run`, `unchanged`, or `restored` where DVC had the result of an earlier run in its cache.
        seconds: Wall-clock time.
        metrics: The stage's metrics, empty if it has none.
    """

    stage: str
    what: str
    seconds: float
    metrics: dict[str, Any]


class PreemptedStage(StageError):
    """A stage was told to stop, but not by this flow; started again, it goes on."""


class Workspace:
    """The repository in the current folder. Leaving the context ends every process that was started in it.

    Args:
        alone: Refuse to share the workspace with another flow. A flow that runs one stage for another one shares it.
        grace: Seconds that a stage has to save its state when it is stopped.

    Attributes:
        slots: How many stages may run at once.
    """

    def __init__(self, *, alone: bool = True, grace: float = child_processes.GRACE) -> None:
        self.slots = environment.parallel()
        self._alone = alone
        self._grace = grace
        self._children = child_processes.ChildProcesses(grace=grace)
        self._lock: IO[str] | None = None

    def __enter__(self) -> Workspace:
        """Lock the workspace.

        Raises:
            StageError: If another flow runs in it, or is still being stopped.
        """
        if not self._alone:
            return self
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        self._lock = LOCK.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StageError(
                f"expected to be the only flow in {Path.cwd()}, but one already runs there (process "
                f"{LOCK.read_text(encoding='utf-8').strip() or 'unknown'}); wait for it, stop it, or run beside it in "
                "a worktree of its own: isolated: true"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        # The supervisors hold the lock too: after a SIGKILL to the flow, none begins until its stages are gone.
        self._children = child_processes.ChildProcesses(grace=self._grace, hold=self.descriptors)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._lock:
            self._lock.close()

    @property
    def descriptors(self) -> list[int]:
        """The lock's descriptor: a process that keeps it open keeps other flows out as long as it lives."""
        return [self._lock.fileno()] if self._lock else []

    def stop(self) -> None:
        """End every running stage; none can be started afterwards."""
        self._children.stop()

    @cached_property
    def graph(self) -> dict[str, tuple[str, ...]]:
        """Each stage with the stages it directly depends on, upstream first.

        Raises:
            StageError: If DVC can not read the workspace.
        """
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo() as repo:
                graph = repo.index.graph
                edges = {
                    stage.addressing: tuple(sorted(up.addressing for up in graph[stage] if not up.is_data_source))
                    for stage in graph
                    if not stage.is_data_source
                }
        except DvcException as error:
            raise StageError(f"DVC can not read the pipeline in {Path.cwd()}: {repro.in_one_line(error)}") from error
        return {stage: edges[stage] for stage in TopologicalSorter(edges).static_order()}

    def select(self, groups: Sequence[str] = (), encoders: Sequence[str] = ()) -> list[str]:
        """Stages with everything upstream of them, upstream first.

        Args:
            groups: Names of stages, each for all encoders that it has (`embed`); none: all.
            encoders: Only the stages of these, and those without an encoder that are named; none: all.

        Raises:
            StageError: If a name is unknown.
        """
        wanted = set(_members(groups, encoders, list(self.graph)))
        for stage in reversed(self.graph):
            if stage in wanted:
                wanted.update(self.graph[stage])
        return [stage for stage in self.graph if stage in wanted]

    def one(self, name: str) -> str:
        """The name, if it is that of a single stage. Raises: StageError if it is not."""
        if members := [stage for stage in self.graph if stage.startswith(f"{name}@")]:
            raise StageError(f"expected a single stage, got {name!r}; name one of {', '.join(members)}")
        _known("a stage", [name], list(self.graph))
        return name

    def unchanged(self) -> set[str]:
        """The stages that need not run: nothing they depend on has changed, nor has anything upstream of them.

        Raises:
            StageError: If DVC fails.
        """
        changed = set(self._status())
        for stage, upstream in self.graph.items():
            if changed.intersection(upstream):
                changed.add(stage)
        return set(self.graph) - changed

    def changed_data(self) -> list[str]:
        """The folders of images that are no longer as `prepare` has read them.

        Raises:
            StageError: If DVC fails.
        """
        values = params.load()
        of_prepare = self._status("prepare").get("prepare", [])
        changed = {name for change in of_prepare if isinstance(change, dict) for name in change.get("changed deps", {})}
        return [folder for folder in (values.data.folder, values.adapt.domains) if folder in changed]

    def _status(self, *stages: str) -> dict[str, Any]:
        """What `dvc status` says of each stage that is not up to date."""
        lines: list[str] = []
        if self._children.stream([*_STATUS, *stages], lines.append):
            raise StageError(f"`dvc status` failed: {' '.join(' '.join(lines).split())}")
        # Warnings may come before and after it.
        found: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
        return found

    def run_stage(
        self,
        stage: str,
        *,
        on_line: Callable[[str], None],
        force: bool = False,
        env: dict[str, str] | None = None,
    ) -> Outcome:
        """Run one stage as `dvc repro --single-item` does, unless DVC finds that nothing has changed.

        Args:
            stage: A stage of `graph`; those upstream of it must be up to date.
            on_line: Receives each line of output as it comes, fit to be logged (`text.safe`).
            force: Run even if nothing has changed.
            env: Added to the stage's environment.

        Raises:
            PreemptedStage: If the stage was told to stop and left its marker.
            StageError: If the stage fails, with its own error and the tail of its output.
        """
        name, _, encoder = stage.partition("@")
        marker = layout.preempted(name, encoder or None)
        marker.unlink(missing_ok=True)  # an old one would stay if the stage could not even start
        begin = time.monotonic()
        tail: deque[str] = deque(maxlen=200)

        def note(line: str) -> None:
            tail.append(safe(line))
            on_line(safe(line))

        command = [*_REPRO, stage, "force" if force else "run"]
        with gpus.held_for(name, stopped=lambda: self._children.stopped, on_wait=on_line) as held:
            status = self._children.stream(command, note, env={**held.env, **(env or {})}, hold=held.descriptors)
        if status in repro.WHAT:
            return Outcome(stage, repro.WHAT[status], time.monotonic() - begin, metrics(stage))
        if self._children.stopped:
            raise StageError(f"{stage} was stopped")
        if marker.exists():
            raise PreemptedStage(f"{stage} was preempted: it was told to stop, and goes on when it is run again")
        raise StageError(_failure(stage, status, list(tail)))


def metrics(stage: str) -> dict[str, Any]:
    """The metrics that a stage has left, empty if it has none. Raises: StageError if they can not be read."""
    name, _, encoder = stage.partition("@")
    path = layout.metrics(name, encoder or None)
    try:
        return read.record(path, {}) if path.exists() else {}
    except DataError as error:
        raise StageError(f"{stage}: {error}") from error


def is_held() -> bool:
    """Whether a flow holds the workspace in the current folder, on any machine whose locks reach here.

    For an instant, this one holds it itself.
    """
    try:
        with LOCK.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or a file system that does not say
        return True
    return False


def drop_damaged() -> int:
    """Hash all that DVC's cache holds, and remove what is damaged, with a line each; how many there were.

    Raises:
        StageError: If there is no workspace of DVC's here, or another DVC process works in it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            objects = (file for file in Path(repo.cache.local.path).glob("??/*") if _OBJECT.fullmatch(file.name))
            records = Path(repo.stage_cache.cache_dir).glob("??/*/*")
            return sum(map(repro.is_dropped, objects)) + sum(map(repro.is_dropped_run, records))
    except DvcException as error:
        raise StageError(f"DVC can not read the cache of {Path.cwd()}: {repro.in_one_line(error)}") from error


@contextmanager
def at_rest() -> Iterator[None]:
    """Let no DVC process write dvc.lock of the current folder meanwhile.

    Raises:
        StageError: If DVC can not read the workspace.
    """
    from dvc.exceptions import DvcException

    try:
        with repro.patient() as repo, repo.lock:
            yield
    except DvcException as error:
        raise StageError(f"DVC can not read the pipeline in {Path.cwd()}: {repro.in_one_line(error)}") from error


def share_cache(folder: Path) -> None:
    """Make a copy of the workspace in another folder use its cache, and take from there what its dvc.lock names.

    Raises:
        StageError: If DVC can not read one of the two.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as here, Repo(str(folder)) as there, there.config.edit("local") as local:
            local.update(here.config.load_one("local"))
            local["cache"]["dir"] = here.cache.local_cache_dir
        with chdir(folder), Repo() as there:
            repro.drop_damaged(there)
            there.checkout("dvc.yaml", force=True, allow_missing=True)
    except DvcException as error:
        raise StageError(f"DVC can not use its cache in {folder}: {repro.in_one_line(error)}") from error


def check(values: schema.Params, groups: Sequence[str] = (), encoders: Sequence[str] = ()) -> None:
    """Refuse what can not run, with more to say than DVC, for which a missing folder is a missing dep.

    Args:
        values: Parameters, which need not be written yet.
        groups: Names of stages, as `Workspace.select` takes them.
        encoders: Names of encoders, as `Workspace.select` takes them.

    Raises:
        StageError: If a folder of images is to be read and is not there, or dvc.yaml with these parameters has no such
            stage or encoder.
    """
    reads = {"data.folder": (values.data.folder, values.data.source == "folder")}
    for name, (folder, needed) in (reads | {"adapt.domains": (values.adapt.domains, True)}).items():
        if needed and not Path(folder).is_dir():
            found = "a file in" if Path(folder).exists() else "no"
            raise StageError(
                f"{name}: expected a folder of images, found {found} {str(Path(folder).absolute())!r}; create it, or "
                f"name another one: {name}=path/to/images"
            )
    stages = []
    graph = params.read(Path("dvc.yaml")).get("stages")
    if not isinstance(graph, dict) or not all(isinstance(stated, dict) for stated in graph.values()):
        raise StageError("expected stages in dvc.yaml, got none that can be read; restore the file")
    for name, stated in graph.items():
        stages += [f"{name}@{encoder}" for encoder in values.encoders] if "foreach" in stated else [name]
    _members(groups, encoders, stages)


def _members(groups: Sequence[str], encoders: Sequence[str], stages: Sequence[str]) -> list[str]:
    """The stages that `Workspace.select` names, without those upstream."""
    names = [stage.partition("@")[::2] for stage in stages]
    _known("a stage", groups, [group for group, _ in names])
    _known("an encoder", encoders, [encoder for _, encoder in names if encoder])
    return [
        stage
        for stage, (group, encoder) in zip(stages, names, strict=True)
        if group in groups or (not groups and (encoder or not encoders))
        if encoder in encoders or not encoders or not encoder
    ]


def _known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    known = list(dict.fromkeys(known))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise StageError(f"expected {what} ({', '.join(known)}), got {name!r}{hint}")


def _failure(stage: str, status: int, tail: list[str]) -> str:
    """The stage's own error, else DVC's, in the first line; then the end of the output."""
    errors = [line for mark in ("ERROR: ", "error: ") for line in tail if line.startswith(mark)]
    why = errors[-1][len("error: ") :] if errors else f"exit status {status}"
    return "\n".join([f"{stage} failed: {why}", *(f"  | {line}" for line in tail[-TAIL:])])
