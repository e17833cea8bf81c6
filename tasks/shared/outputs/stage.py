"""What all stages do alike: arguments, parameters, a run in MLflow, outputs written at once, errors in one line.

    with stage.running("embed") as here:
        files.write_array(here.folder / "train.npy", features)

writes artifacts/embed/<encoder>/train.npy if the body succeeds. If there are several processes (launcher.py), all run
the body, but only the main one tracks and writes outputs.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepclust import config, temporary
from deepclust.errors import PreemptedError
from tasks.shared.operations import costs, lock, params, snapshot, tracking
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.params import schema
from tasks.shared.operations.processes import launcher, orphans, signals
from tasks.shared.outputs import environment, layout, lineage, tables


@dataclass
class Here:
    """What a running stage works with.

    Attributes:
        stage: Name of the stage.
        encoder: Name of the encoder, or None for a stage that runs once.
        params: All parameters.
        folder: Where to write; replaces the stage's output folder when the stage succeeds.
        run: The stage's run in MLflow, on the main process.
        clock: What the stage takes; pretraining keeps it in the state of its run.
    """

    stage: str
    encoder: str | None
    params: schema.Params
    folder: Path
    run: tracking.Run
    clock: costs.Clock
    _made_from: dict[str, str]
    _files: dict[Path, str] = field(default_factory=dict)
    _measured: dict[str, Any] = field(default_factory=dict)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Write the stage's metrics file and log its numbers to MLflow. Nested mappings are joined by dots there."""
        self._files[layout.metrics(self.stage, self.encoder)] = json_text(_rounded(values))
        self.run.log_metrics(dict(_flat(values)))

    def curve(self, rows: Iterable[Mapping[str, Any]], columns: list[str]) -> None:
        """Write the stage's curve as CSV, for `dvc plots`."""
        assert self.encoder
        self._files[layout.curve(self.stage, self.encoder)] = table(rows, columns)

    def cost(self, **measured: float) -> None:
        """Note clock readings and what they are of, which no output may hold; see `costs.record`."""
        self._measured |= measured

    def commit(self) -> None:
        """Replace the old outputs, after all that can fail on a full disk."""
        target = layout.out(self.stage, self.encoder)
        partials = {path: _partial(path) for path in self._files}
        try:
            for path, text in self._files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                partials[path].write_text(text, encoding="utf-8")
            lineage.write(self.folder, self._made_from, self._files)
            shutil.rmtree(target, ignore_errors=True)
            self.folder.replace(target)
            for path, partial in partials.items():
                partial.replace(path)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
        reading = costs.record(self.stage, self.encoder, self.clock.state_dict() | self._measured)
        write_if_possible(layout.cost(self.stage, self.encoder), json_text(reading))


def _partial(path: Path) -> Path:
    """Where a file or folder is written before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def _rounded(value: Any) -> Any:
    """Six significant digits: enough for any metric, and short in a diff."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, float(value)


def table(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    """Rows as CSV text; floats with six significant digits."""
    text = io.StringIO()
    writer = tables.Writer(text, columns)
    writer.header()
    writer.add({key: _rounded(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def json_text(value: Any) -> str:
    """JSON that a person can read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that it is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_if_possible(path: Path, text: str) -> None:
    """Write a text file that nothing depends on; on a full or read-only disk nothing is written."""
    try:
        write_text(path, text)
    except OSError:
        with suppress(OSError):
            _partial(path).unlink(missing_ok=True)


@contextmanager
def running(stage: str) -> Iterator[Here]:
    """Run the body as the stage; see the head of this file.

    A user's mistake, parameters, code or inputs that change meanwhile, a full or read-only disk, and an unreachable
    tracking server end the process with status 2 and one line on stderr, SIGTERM with status 143. A run that saved its
    state before it stopped (PreemptedError) ends with one line and status 143 or 130. The old outputs are then still
    there. Any other exception is a bug and keeps its traceback.
    """
    clock = costs.Clock()
    per_encoder = stage not in layout.ONCE
    parser = argparse.ArgumentParser(prog=f"python -m tasks.{stage}")
    if per_encoder:
        parser.add_argument("encoder", help="an encoder of params.yaml")
    arguments = parser.parse_args()
    encoder: str | None = None
    if per_encoder:  # DVC gives the name of its stage, such as embed@swav
        with errors_as_one_line():
            encoder = config.parse(config.Name, arguments.encoder.rpartition(f"{stage}@")[2], "encoder")
    if not launcher.is_worker():
        orphans.end_with_dvc()
    if launcher.wanted(stage):
        with errors_as_one_line(), _marked_if_told_to_stop(layout.preempted(stage, encoder)):
            # The encoder alone: all machines have to name the same run, whether DVC or a person starts it there.
            sys.exit(launcher.start(f"tasks.{stage}", [encoder] if encoder else []))
    alone = nullcontext() if launcher.is_worker() else temporary.everything()
    with errors_as_one_line(), signals.sigterm_exits(), alone:
        environment.prepare()
        environment.limit_threads()
        with launcher.joined(), _marked_if_told_to_stop(layout.preempted(stage, encoder)), ExitStack() as stack:
            raw = params.read()
            values = params.parse(raw, whole=stage not in ("sizes", "prepare"))  # the next stage checks methods
            method = values.method(encoder) if encoder is not None else ""
            before: snapshot.Snapshot | None = None
            partial = _partial(layout.out(stage, encoder))
            sources = lineage.inputs(stage, *([encoder] if encoder else values.encoders))
            with launcher.together():
                if launcher.is_main():
                    before = snapshot.take(stage, encoder, raw, method=method)
                    stack.enter_context(lock.locked(f"{stage}@{encoder}" if encoder else stage, seconds=_patience()))
                    lineage.check(sources)
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    stack.callback(shutil.rmtree, partial, ignore_errors=True)
                run = stack.enter_context(tracking.stage_run(stage, encoder, values))
            here = Here(stage, encoder, values, partial, run, clock, lineage.hashes(sources))
            yield here
            with launcher.together():
                if before:
                    before.check()
                    here.commit()


def _patience() -> float:
    """Seconds to wait for another process at this stage: one whose DVC was killed ends within 15.

    An NFS server keeps the lock of a lost machine for 90; the other processes of this run wait for it meanwhile.
    """
    return min(100, environment.collective_seconds() / 2) if launcher.is_worker() else 20


@contextmanager
def _marked_if_told_to_stop(marker: Path) -> Iterator[None]:
    """Leave a marker file if a signal stops the body, since DVC does not pass on a stage's exit status.

    A process that torchrun started leaves none on SIGTERM, which torchrun also sends when another process is lost: its
    launcher decides.
    """
    if not launcher.is_main():
        yield
        return
    marker.unlink(missing_ok=True)
    try:
        yield
    except (PreemptedError, KeyboardInterrupt, SystemExit) as end:
        stopped = not isinstance(end, SystemExit) or end.code in (signals.TERMINATED, 128 + signal.SIGINT)
        if isinstance(end, PreemptedError) or (stopped and not launcher.is_worker()):
            with suppress(OSError):  # on a full disk the stage counts as failed
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
        raise
