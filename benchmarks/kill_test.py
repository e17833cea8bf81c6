"""Runs killed by SIGKILL at random moments, each gone on from: byte for byte what a run that nobody kills writes?

    python benchmarks/kill_test.py
    python benchmarks/kill_test.py --methods pcl --kills 5 --processes 1 --seed 7

In a throw-away copy of the repository's code, on small made-up images, each method trains once undisturbed. Then each
run is killed once, the kinds of moments in turn:

- forward: one process, at a Python or C call in the loss of an update;
- saving: the main process, at an operation on the disk while it saves its state;
- E-step: one process, at a call in `before_epoch`; where a method clusters nothing, in the making of an update's views;
- one rank: one process from outside, at any time after the first checkpoint;
- all ranks: all from outside, their launcher included, likewise.

In the first three the launcher dies too, every other time. torchrun starts the group again where it lives; else the
same command is given again. The program that is killed from inside is this file, around the stage as it is. A kill
costs about 20 s on two quiet cores, most of them for importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from tasks.shared.operations.params import overrides
from tasks.shared.outputs import environment, layout

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("swav", "pcl", "moco", "simsiam", "deepcluster_v2")
INSIDE = ("forward", "saving", "E-step")
OUTSIDE = ("one rank", "all ranks")
CLUSTERING = ("pcl", "deepcluster_v2")  # those whose `before_epoch` is work
IMAGES = 132  # 105 of them to train on: 13 updates an epoch, which the updates between two checkpoints do not divide
SMALL = [
    "data.source=folder",
    "data.folder=images",
    "pretrain.shared.image_size=16",
    "pretrain.pixels.image_size=16",
    "data.test_fraction=0.2",
    "pretrain.checkpoint={every_steps: 3, every_seconds: null, keep: 2}",
    f"encoders=[pixels, random, {', '.join(METHODS)}]",
    *(f"pretrain.{method}.{edit}" for method in METHODS for edit in ("epochs=5", "batch_size=8")),
    "pretrain.swav.prototypes=12",
    "pretrain.swav.queue_length=24",
    "pretrain.swav.queue_start_epoch=1",
    "pretrain.deepcluster_v2.prototypes=[12, 12, 12]",
    "pretrain.pcl.clusters=[20, 30]",
    "pretrain.pcl.negatives=8",
    "pretrain.pcl.queue_length=32",
    "pretrain.moco.queue_length=32",
]
_PLAN = "DEEPCLUST_KILL_TEST"  # what the program is to do, as JSON
_DISK = {"fsync", "mkdir", "open", "rename", "rmdir", "unlink", "write"}
_LONGEST = 240  # seconds of a run, after which it counts as hung
_POLL = 0.005


# The program that is killed from inside.


class Phase:
    """A function of the library, in every call of which those made from it are counted.

    Args:
        counts: Whether a call counts, by the profiler's event and what it calls.
        last: Number of the call to the function, and the one in it, that are this process's last; or None.
        die: How it ends.
    """

    def __init__(
        self, counts: Callable[[str, Any], bool], last: tuple[int, int] | None, die: Callable[[str], None]
    ) -> None:
        self.found: list[int] = []
        self._counts, self._last, self._die = counts, last, die

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched."""

        @functools.wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            self.found.append(0)
            sys.setprofile(self._note)
            try:
                result = function(*arguments, **named)
            finally:
                sys.setprofile(None)
            if self._last and len(self.found) - 1 == self._last[0]:  # it was shorter than in the run that was measured
                self._die(f"call {self._last[0]}, at its end")
            return result

        return watched

    def _note(self, frame: Any, event: str, called: Any) -> None:
        if not self._counts(event, called):
            return
        if self._last == (len(self.found) - 1, self.found[-1]):
            name = called.__name__ if event == "c_call" else frame.f_code.co_name
            self._die(f"call {self._last[0]}, at {name} ({self._last[1]})")
        self.found[-1] += 1


def program(method: str) -> None:
    """`tasks.pretrain`, which measures its phases, or ends itself once in one of them."""
    from tasks.shared.operations.processes import launcher

    if launcher.wanted("pretrain"):
        sys.exit(launcher.start("benchmarks.kill_test", sys.argv[1:]))
    from deepclust import methods
    from deepclust.training import checkpoint, views
    from tasks.pretrain import __main__ as pretrain

    plan: dict[str, Any] = json.loads(os.environ[_PLAN])
    folder, rank = Path(plan["folder"]), int(os.environ.get("RANK", "0"))
    mine = "kind" in plan and plan["rank"] == rank and not (folder / "killed").exists()

    def die(where: str) -> None:
        _note_kill(folder, f"rank {rank} {where}", newest(Path(), method))
        if plan["whole"]:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def phase(kind: str, counts: Callable[[str, Any], bool], owner: Any, name: str) -> Phase:
        last = (plan["occurrence"], plan["call"]) if mine and plan["kind"] == kind else None
        result = Phase(counts, last, die)
        if last or "kind" not in plan:
            setattr(owner, name, result.around(getattr(owner, name)))
        return result

    def any_call(event: str, _: Any) -> bool:
        return event in ("call", "c_call")

    def disk_call(event: str, called: Any) -> bool:
        return event == "c_call" and called.__name__ in _DISK

    kind: type = methods.method_class(method)
    where = (kind, "before_epoch") if method in CLUSTERING else (views, "multi_crop")
    phases = {
        "forward": phase("forward", any_call, kind, "loss"),
        "saving": phase("saving", disk_call, checkpoint.Store, "save"),
        "E-step": phase("E-step", any_call, *where),
    }
    sys.argv = ["tasks.pretrain", method]
    pretrain.main()
    if "kind" not in plan:
        found = json.dumps({name: found.found for name, found in phases.items()})
        (folder / f"calls-{rank}.json").write_text(found, encoding="utf-8")


def _note_kill(folder: Path, where: str, step: int) -> None:
    text = json.dumps({"where": where, "newest": step})
    (folder / "killed").write_text(text, encoding="utf-8")


# The one who kills.


class RunError(Exception):
    """A run did not end as it should."""


@dataclass(frozen=True, kw_only=True)
class Straight:
    """A run that nobody kills.

    Attributes:
        files: What it writes.
        calls: For each rank and kind of moment, the calls that were counted, one number for each time.
        seconds: From its first checkpoint to its outputs.
    """

    files: Mapping[str, bytes]
    calls: Sequence[Mapping[str, Sequence[int]]]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A run that was killed once and gone on from.

    Attributes:
        method: What was trained.
        kind: Which moment.
        where: The moment, in words.
        newest: Update of the newest checkpoint then, 0 if there was none.
        resumed: Update from which it went on.
        wrong: What is not as it should be, or nothing.
        seconds: For all of it.
    """

    method: str
    kind: str
    where: str
    newest: int
    resumed: int
    wrong: str
    seconds: float


class Workspace:
    """A throw-away copy of the code with prepared images.

    Args:
        root: An empty folder, or none yet.
        processes: How many train.
        edits: Of params.yaml.
    """

    def __init__(self, root: Path, *, processes: int, edits: Sequence[str] = ()) -> None:
        self.root, self.processes = root.resolve(), processes
        for room in ("tasks", "deepclust", "benchmarks"):
            shutil.copytree(ROOT / room, self.root / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (layout.PARAMS, "dvc.yaml"):
            shutil.copy(ROOT / file, self.root)
        overrides.apply([*SMALL, *edits], self.root / layout.PARAMS)
        _pictures(self.root / "images")
        (self.root / "domains").mkdir()
        (self.root / "tmp").mkdir()
        self._log, self._notes = self.root / "log.txt", self.root / "notes"
        for stage in ("sizes", "prepare"):
            self._run([sys.executable, "-m", f"tasks.{stage}"], {})

    def straight(self, method: str) -> Straight:
        """Train undisturbed, twice: the second run counts calls, and tells whether two runs are the same at all.

        Raises:
            RunError: If they are not, or one fails.
        """
        files, seconds = self._undisturbed(method, _stage(method), {})
        measured = self.measured(method)
        if different := _different(files, measured.files):
            raise RunError(f"{method}: two undisturbed runs differ in {different}: there is nothing to compare with")
        return Straight(files=files, calls=measured.calls, seconds=seconds)

    def measured(self, method: str) -> Straight:
        """Train undisturbed, once, counting calls."""
        files, seconds = self._undisturbed(method, _program(method), {_PLAN: json.dumps({"folder": str(self._notes)})})
        texts = [(self._notes / f"calls-{rank}.json").read_text(encoding="utf-8") for rank in range(self.processes)]
        return Straight(files=files, calls=[json.loads(text) for text in texts], seconds=seconds)

    def _undisturbed(
        self, method: str, command: list[str], variables: Mapping[str, str]
    ) -> tuple[dict[str, bytes], float]:
        """What a run writes, and seconds from its first checkpoint to that."""
        self._forget(method)
        times: list[float] = []

        def look(_: subprocess.Popen[bytes]) -> None:
            done = (bool(newest(self.root, method)), self._ended(method))
            if len(times) < 2 and done[len(times)]:
                times.append(time.monotonic())

        self._run(command, variables, look)
        if len(times) < 2:
            raise RunError(f"{method}: expected a checkpoint and outputs, saw {len(times)} of them")
        return self._outputs(method), times[1] - times[0]

    def kill(self, method: str, kind: str, straight: Straight, draw: random.Random, *, whole: bool) -> Kill:
        """Train, be killed at a moment of a kind, go on, and compare.

        Args:
            method: What to train.
            kind: Which moment.
            straight: What to compare with.
            draw: Draws the moment.
            whole: Whether a process that is killed from inside takes the launcher with it.
        """
        begin = time.monotonic()
        self._forget(method)
        again, wrong = 0, ""
        try:
            if kind in INSIDE:
                again = self._kill_inside(method, kind, straight, draw, whole=whole and self.processes > 1)
            else:
                again = self._kill_outside(method, kind, straight, draw)
        except RunError as error:
            wrong = str(error)
        killed: dict[str, Any] = {"where": "never", "newest": 0}
        if (self._notes / "killed").exists():
            killed = json.loads((self._notes / "killed").read_text(encoding="utf-8"))
        said = self._log.read_text(encoding="utf-8", errors="replace")
        resumed = max((int(step) for step in re.findall(r"goes on after update (\d+)", said)), default=0)
        if not wrong:
            again += said.count("all start again")
            different, left = _different(straight.files, self._outputs(method)), self._left()
            claims = {
                f"differs in {different}": not different,
                f"passed over the checkpoint of update {killed['newest']}": resumed >= killed["newest"],
                f"started again {again} times, not once": again == 1,
                f"left {left} behind": not left,
            }
            wrong = "; ".join(what for what, right in claims.items() if not right)
        return Kill(
            method=method,
            kind=kind,
            where=killed["where"],
            newest=killed["newest"],
            resumed=resumed,
            wrong=wrong,
            seconds=time.monotonic() - begin,
        )

    def _kill_inside(self, method: str, kind: str, straight: Straight, draw: random.Random, *, whole: bool) -> int:
        rank = 0 if kind == "saving" else draw.randrange(self.processes)
        times = straight.calls[rank][kind]
        occurrence = draw.randrange(len(times))
        plan = {
            "folder": str(self._notes),
            "kind": kind,
            "rank": rank,
            "occurrence": occurrence,
            "call": draw.randrange(times[occurrence]),
            "whole": whole,
        }
        return self._to_the_end(_program(method), {_PLAN: json.dumps(plan)})

    def _kill_outside(self, method: str, kind: str, straight: Straight, draw: random.Random) -> int:
        share, rank, again = draw.random(), draw.randrange(self.processes), 0
        while not (self._notes / "killed").exists():
            self._forget(method)
            first: list[float] = []
            wait = share * straight.seconds

            def look(launcher: subprocess.Popen[bytes], first: list[float] = first, wait: float = wait) -> None:
                step = newest(self.root, method)
                if step and not first:
                    first.append(time.monotonic())
                if not first or time.monotonic() < first[0] + wait or (self._notes / "killed").exists():
                    return
                family = [launcher, *_ranks(launcher.pid)]
                if self._ended(method) or (self.processes > 1 and len(family) <= self.processes):
                    return
                killed = family if kind == "all ranks" else [family[1 + rank] if self.processes > 1 else launcher]
                for process in killed:
                    process.kill()
                who = f"rank {rank}" if kind == "one rank" else "all"
                _note_kill(self._notes, f"{who}, {wait:.2f} s after the first checkpoint", step)

            again = self._to_the_end(_stage(method), {}, look)
            share *= 0.7  # where the run was faster than the undisturbed one
        return again

    def _to_the_end(
        self,
        command: list[str],
        variables: Mapping[str, str],
        look: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> int:
        """Run a command, and again if its first process was killed; how often again."""
        try:
            self._run(command, variables, look)
            return 0
        except RunError:
            if not (self._notes / "killed").exists() or self._status != -signal.SIGKILL:
                raise
            deadline = time.monotonic() + 20
            while left := _within(self.root):
                if time.monotonic() > deadline:
                    raise RunError(f"{len(left)} process(es) outlived their launcher") from None
                time.sleep(0.05)
            self._run(command, variables)
            return 1

    def _run(
        self,
        command: list[str],
        variables: Mapping[str, str],
        look: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> None:
        ours = {
            "CUDA_VISIBLE_DEVICES": "",
            "DEEPCLUST_COLLECTIVE_SECONDS": "60",
            "DEEPCLUST_THREADS": str(self.processes),  # one each
            "DEEPCLUST_TRACKING": "off",
            "PYTHONPATH": str(self.root),
            "TMPDIR": str(self.root / "tmp"),
        }
        if self.processes > 1:
            ours["PET_NPROC_PER_NODE"] = str(self.processes)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "DEEPCLUST_"))}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.root, env={**inherited, **ours, **variables}, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + _LONGEST
        try:
            while process.poll() is None:
                if look:
                    look(process)
                if time.monotonic() > deadline:
                    raise RunError(f"hung: no end within {_LONGEST} s")
                time.sleep(_POLL if look else 0.05)
        finally:
            if process.poll() is None:
                process.kill()  # the others die with it
                process.wait()
        self._status = process.returncode
        if self._status:
            said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise RunError(f"ended with status {self._status}: {' / '.join(said)}")

    def _ended(self, method: str) -> bool:
        return (self.root / layout.out("pretrain", method)).exists()

    def _forget(self, method: str) -> None:
        """As if the method had never been trained."""
        for folder in (self.root / layout.out("pretrain", method), self.root / layout.STATE, self._notes):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (layout.metrics("pretrain", method), layout.curve("pretrain", method)):
            (self.root / file).unlink(missing_ok=True)
        self._notes.mkdir()
        self._log.write_text("", encoding="utf-8")

    def _left(self) -> str:
        """Files of unfinished runs, what was to become an output, and temporary files."""
        state = self.root / layout.STATE
        found = [path for path in state.rglob("*") if path.is_file() and path.suffix != ".lock"]
        found = [path for path in found if not path.is_relative_to(state / "costs")]  # of finished ones
        found += (self.root / "tmp").iterdir()
        for folder in (layout.ARTIFACTS, layout.METRICS, layout.PLOTS):
            found += (self.root / folder).rglob(".*.partial")
        return ", ".join(str(path.relative_to(self.root)) for path in sorted(found))

    def _outputs(self, method: str) -> dict[str, bytes]:
        paths = [path for path in (self.root / layout.out("pretrain", method)).rglob("*") if path.is_file()]
        paths += [self.root / layout.metrics("pretrain", method), self.root / layout.curve("pretrain", method)]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths if path.exists()}


def newest(root: Path, method: str) -> int:
    """Update of the newest checkpoint, 0 if there is none."""
    found = (root / layout.runs(method)).glob("*/step-*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def _stage(method: str) -> list[str]:
    return [sys.executable, "-m", "tasks.pretrain", method]


def _program(method: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.kill_test", "--program", method]


def _pictures(folder: Path) -> None:
    """Three kinds of stripes in noise, in class folders."""
    random_numbers = np.random.default_rng(0)
    for index in range(IMAGES):
        kind = index % 3
        picture = random_numbers.integers(0, 60, (18, 18, 3))
        picture[:, 6 * kind : 6 * kind + 6] += 180
        path = folder / f"kind{kind}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)


def _ranks(launcher: int) -> list[psutil.Process]:
    """The processes that torchrun started, in the order of their ranks."""
    found = {}
    for process in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):
            found[process.environ()["RANK"]] = process
    return [found[rank] for rank in sorted(found)]


def _within(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _different(expected: Mapping[str, bytes], got: Mapping[str, bytes]) -> str:
    """Names of the files that are not the same, or of one side only."""
    return ", ".join(sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)))


def kinds(processes: int) -> list[str]:
    """The kinds of moments; alone, a process is all ranks."""
    return [*INSIDE, *(OUTSIDE if processes > 1 else OUTSIDE[1:])]


def table(kills: Sequence[Kill], processes: int) -> str:
    """Method × kind in Markdown: identical of tried."""
    columns = kinds(processes)

    def cell(chosen: Sequence[Kill]) -> str:
        return f"{sum(not kill.wrong for kill in chosen)} of {len(chosen)}"

    lines = [f"| method | {' | '.join(columns)} | all |", f"|---|{'---|' * (len(columns) + 1)}"]
    for method in dict.fromkeys(kill.method for kill in kills):
        own = [kill for kill in kills if kill.method == method]
        cells = [cell([kill for kill in own if kill.kind == kind]) for kind in columns]
        lines.append(f"| {method} | {' | '.join(cells)} | {cell(own)} |")
    return "\n".join(lines)


def main() -> None:
    """Kill and go on; print the table, and end with status 1 if a run was not the same."""
    parser = argparse.ArgumentParser(prog="python benchmarks/kill_test.py", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed, for each method")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--program", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        program(arguments.program)
        return
    kills = []
    with environment.sigterm_exits(), tempfile.TemporaryDirectory(prefix="deepclust-kill-") as folder:
        workspace = Workspace(Path(folder) / "run", processes=arguments.processes)
        for method in arguments.methods:
            begin = time.monotonic()
            try:
                straight = workspace.straight(method)
            except RunError as error:
                sys.exit(f"error: {error}")
            print(f"{method}: two undisturbed runs, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            for number in range(arguments.kills):
                kind = kinds(arguments.processes)[number % len(kinds(arguments.processes))]
                draw = random.Random(f"{arguments.seed}-{method}-{number}")
                kills.append(kill := workspace.kill(method, kind, straight, draw, whole=number % 2 == 1))
                print(
                    f"{method} {number + 1}/{arguments.kills} {kind}: {kill.where}; newest checkpoint {kill.newest}, "
                    f"went on from {kill.resumed}; {kill.wrong or 'identical'}; {kill.seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    print(table(kills, arguments.processes))
    early = sum(not kill.newest for kill in kills)
    print(f"\n{early} of {len(kills)} kills came before the first checkpoint.")
    sys.exit(int(any(kill.wrong for kill in kills)))


if __name__ == "__main__":
    main()
