"""The shell around a stage: its arguments, parameters, run in MLflow, atomic outputs and one-line errors.

    with stage.running("embed") as here:
        np.save(here.folder / "train.npy", features)

writes artifacts/embed/<encoder>/train.npy, whole or not at all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepclust.errors import DeepclustError
from tasks import environment, layout, params, sections, tracking


@dataclass
class Here:
    """What a running stage works with.

    Attributes:
        stage: Name of the stage.
        encoder: Name of the encoder, or None for a stage that runs once.
        params: All parameters.
        folder: Where to write; becomes the stage's output folder when the stage succeeds.
        run: The stage's run in MLflow.
    """

    stage: str
    encoder: str | None
    params: sections.Params
    folder: Path
    run: tracking.Run
    _files: dict[Path, str] = field(default_factory=dict)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Write the stage's metrics file and log its numbers to MLflow. Nested mappings are joined by dots there."""
        text = json.dumps(_rounded(values), indent=2, ensure_ascii=False) + "\n"
        self._files[layout.metrics(self.stage, self.encoder)] = text
        self.run.log_metrics(dict(_flat(values)))

    def curve(self, rows: Iterable[Mapping[str, Any]], columns: list[str]) -> None:
        """Write the stage's curve as CSV, for `dvc plots`."""
        assert self.encoder
        self._files[layout.curve(self.stage, self.encoder)] = table(rows, columns)

    def commit(self) -> None:
        """Put everything in its place. What may find the disk full comes before anything old is replaced."""
        target = layout.out(self.stage, self.encoder)
        partials = {path: _partial(path) for path in self._files}
        try:
            for path, text in self._files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                partials[path].write_text(text, encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            self.folder.replace(target)
            for path, partial in partials.items():
                partial.replace(path)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where a file or folder is written before it takes its name."""
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
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def running(stage: str) -> Iterator[Here]:
    """Run the body as the stage; see the head of this file.

    A user's mistake, a full or read-only disk, and an unreachable tracking server end the process with status 2 and
    one line on stderr, SIGTERM with status 143; nothing of the stage's outputs is left behind then. Any other exception
    is a bug and keeps its traceback.
    """
    per_encoder = stage not in ("prepare", "report")
    parser = argparse.ArgumentParser(prog=f"python -m tasks.{stage}")
    if per_encoder:
        parser.add_argument("encoder", help="an encoder of params.yaml")
    arguments = parser.parse_args()
    encoder: str | None = arguments.encoder if per_encoder else None
    with errors_as_one_line(), environment.sigterm_exits():
        environment.prepare()
        environment.limit_threads()
        values = params.load()
        if encoder is not None:
            values.method(encoder)
        target = layout.out(stage, encoder)
        partial = _partial(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with tracking.stage_run(stage, encoder, values) as run:
                here = Here(stage, encoder, values, partial, run)
                yield here
                here.commit()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """Turn a user's mistake into one line and status 2."""
    try:
        yield
    except DeepclustError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None or os.environ.get("DEEPCLUST_TRACEBACK"):
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}; free or mend it and run again", file=sys.stderr)
        sys.exit(2)
