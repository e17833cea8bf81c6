"""What a run logs, on its way to the tracking server: a file under state/tracking/, and a thread that sends from it.

    outbox = Outbox(run_id, "embed@swav", send)
    outbox.add(Entry(run_id, "metrics", [["loss", 2.0, 1700000000000, 3]]))
    outbox.close()

Nothing here waits for the server, except `close`, for seconds. An entry is one line of the file before it is sent. The
file is emptied whenever all is sent, and removed at the end. If the process dies, or the server is away at the end, the
file stays for `deliver`. An entry may be sent twice, as after a lost answer, so it has to be one that changes nothing
the second time.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tasks.shared.operations import store
from tasks.shared.operations.text import printable, say, warn
from tasks.shared.outputs import layout

FOLDER = layout.STATE / "tracking"
COMMAND = "python -m tasks.tracking sync"
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 5.0  # for the server to take the next entries, at the end of a run
HURRY_SECONDS = 1.0  # for all of them, where a signal ends the run
_BATCH = 1000  # metrics that MLflow takes in one request


class Entry(NamedTuple):
    """One request to the server: to which run, of which kind, and what."""

    run_id: str
    kind: str
    values: Sequence[Any]


Send = Callable[[Entry], None]


class Outbox:
    """The queue of one process.

    Args:
        run_id: The run whose name the file has; entries may be of others too.
        title: What the run is called in messages.
        send: Delivers an entry or raises; called in a thread of its own.

    Raises:
        OSError: If the file can not be made.
    """

    def __init__(self, run_id: str, title: str, send: Send) -> None:
        self.path = FOLDER / f"{run_id}.jsonl"
        self._title = title
        self._send = send
        self._pending: deque[Entry] = deque()
        self._changed = threading.Condition()  # of all that follows
        self._head = _line({"run_id": run_id, "title": title, "store": store.place()})
        self._file: BinaryIO | None = self._create()
        self._copies = itertools.count()
        self._sent = 0
        self._failed_at: int | None = None  # how many entries were sent when the server was lost first
        self._reason = ""  # of the last failure
        self._closing = False
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        """Queue an entry."""
        with self._changed:
            self._write(_line(entry))
            self._pending.append(entry)
            self._changed.notify_all()

    def add_file(self, run_id: str, path: Path) -> None:
        """Queue a copy of a file as it is now; what cannot be copied is only warned of."""
        copy = self._copies_folder() / str(next(self._copies)) / path.name
        try:
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            self._warn("copy", f"{path} is not tracked ({store.line(error)})")
            return
        self.add(Entry(run_id, "artifact", [copy.relative_to(FOLDER).as_posix()]))

    def close(self, *, hurry: bool = False) -> None:
        """Wait as long as the server takes what is queued, in a hurry for a second, and say what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        before = -1
        while self._thread.is_alive() and before < self._sent:
            before = self._sent
            self._thread.join(HURRY_SECONDS if hurry else PATIENCE_SECONDS)
            if hurry:
                break
        with self._changed:
            assert self._file
            if self._pending:
                with suppress(OSError):  # on a full disk what is delivered stays in the file too
                    partial = self._partial()
                    partial.write_bytes(self._head + b"".join(map(_line, self._pending)))
                    partial.replace(self.path)
                why = f" ({self._reason})" if self._reason else ""
                kept = f"{len(self._pending)} entries of {self._title} are kept in {self.path}{why}"
                warn(f"tracking: {kept}; `{COMMAND}` delivers them")
            else:
                _remove(self.path)
            self._file.close()
            self._file = None

    def _create(self) -> BinaryIO:
        """The locked file, which has its name only then, so that nobody takes it for one that was left."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = self._partial()
        file = partial.open("wb", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(self._head)
        partial.replace(self.path)
        return file

    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    def _copies_folder(self) -> Path:
        return self.path.with_suffix("")

    def _write(self, line: bytes) -> None:
        """Append a line whole or, on a full disk, not at all: then the entry is in memory only."""
        assert self._file, "the run has ended"
        end = self._file.tell()
        reason = "no space left on device"
        try:
            if self._file.write(line) == len(line):
                return
        except OSError as error:
            reason = store.line(error)
        with suppress(OSError):
            self._file.truncate(end)
            self._file.seek(end)
        self._warn("disk", f"what the run logs can not be kept on disk while it is sent ({reason})")

    def _work(self) -> None:
        with suppress(Exception):  # the run's own entries will say what is wrong
            for line, delivered in deliver(self._send):  # what earlier runs left
                if delivered:
                    say(f"tracking: {line}")
        while entries := self._next():
            closing = self._closing
            try:
                for refusal in _send(entries, self._send):
                    self._warn("refused", f"MLflow refused what {self._title} logged ({refusal})")
            except Exception as error:
                self._lost(error)
                if closing:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)
            else:
                self._delivered(len(entries))

    def _next(self) -> list[Entry]:
        """The next entries that fit into one request; waits for them. None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            return _first(self._pending)

    def _delivered(self, count: int) -> None:
        with self._changed:
            if self._file is None:  # closed while the server was about to answer: the file says what is left
                return
            for _ in range(count):
                self._pending.popleft()
            self._sent += count
            self._reason = ""
            if not self._pending:
                with suppress(OSError):
                    self._file.truncate(len(self._head))
                    self._file.seek(len(self._head))
                if self._failed_at is not None:
                    kept = self._sent - self._failed_at
                    self._warn("back", f"tracking works again, {kept} entries that were kept are delivered", "")

    def _lost(self, error: Exception) -> None:
        with self._changed:
            self._reason = store.line(error)
            if self._failed_at is None and not self._closing:  # `close` says it else
                self._failed_at = self._sent
                kept = f"the run goes on, and what it logs is kept in {self.path}"
                self._warn("lost", f"tracking stopped working ({self._reason}); {kept}")

    def _warn(self, what: str, text: str, prefix: str = "warning: ") -> None:
        """Say something once."""
        if what not in self._warned:
            self._warned.add(what)
            say(f"{prefix}{text}", file=sys.stderr)


def deliver(send: Send) -> Iterator[tuple[str, bool]]:
    """Send what runs that have ended left. For each, a line about it and whether it is delivered.

    Raises:
        Exception: What `send` raises if the server is lost; the files stay.
    """
    for path in sorted(FOLDER.glob("*.jsonl")):
        with _claimed(path) as file:
            if file is None:
                continue
            left = _read(path, file)
            if left is None:
                yield f"{path} is damaged and has nothing that could be delivered; remove it", False
                continue
            name = printable(f"{left.title}, run {left.run_id}")
            if _send([Entry(left.run_id, "exists", [])], send):
                found = f"{name} is not in {store.place()}; it was tracked in {printable(left.store)}"
                yield f"{found}: set MLFLOW_TRACKING_URI, or remove {path}", False
                continue
            refusals, pending = [], deque(left.entries)
            while entries := _first(pending):
                refusals += _send(entries, send)
                for _ in entries:
                    pending.popleft()
            _remove(path)
            notes = [f"{len(refusals)} refused ({refusals[0]})"] if refusals else []
            notes += [f"{left.damaged} damaged lines left out"] if left.damaged else []
            if left.entries or notes:
                sent = f"{name}: {len(left.entries) - len(refusals)} entries delivered"
                yield ", ".join([sent, *notes]), True


def in_use() -> list[Path]:
    """Files of runs that have not ended."""
    return [path for path in sorted(FOLDER.glob("*.jsonl")) if not _free(path)]


@dataclass(frozen=True)
class _Left:
    run_id: str
    title: str
    store: str
    entries: list[Entry]
    damaged: int


@contextmanager
def _claimed(path: Path) -> Iterator[BinaryIO | None]:
    """A file, locked; None if a run still writes it or another process has just delivered it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file if os.fstat(file.fileno()).st_nlink else None


def _free(path: Path) -> bool:
    with _claimed(path) as file:
        return file is not None


def _read(path: Path, file: BinaryIO) -> _Left | None:
    """What a file holds; None without a head. A line that is damaged, as the last of a lost machine, is counted."""
    rows = [_row(line) for line in file]
    head = rows[0] if rows else None
    if not isinstance(head, dict) or head.get("run_id") != path.stem:
        return None
    entries = [Entry(*row) for row in rows[1:] if _is_entry(row, path.stem)]
    title, place = (str(head.get(name, "unknown")) for name in ("title", "store"))
    return _Left(path.stem, title, place, entries, damaged=len(rows) - 1 - len(entries))


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_entry(row: Any, run_id: str) -> bool:
    whole = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[2], list)
    if whole and row[1] == "artifact":  # only a copy of this run's may leave the machine
        folder = (FOLDER / run_id).resolve()
        return len(row[2]) == 1 and (FOLDER / str(row[2][0])).resolve().is_relative_to(folder)
    return whole


def _first(pending: Iterable[Entry]) -> list[Entry]:
    """The first entry, with those that follow if all are metrics of one run and fit into one request."""
    taken: list[Entry] = []
    size = 0
    for entry in pending:
        size += len(entry.values)
        if taken and (entry[:2] != taken[0][:2] or entry.kind != "metrics" or size > _BATCH):
            break
        taken.append(entry)
    return taken


def _send(entries: Sequence[Entry], send: Send) -> list[str]:
    """Send entries of one request, one by one if it is refused; why some of them were. Raises if the server is lost."""
    first = entries[0]
    try:
        send(Entry(first.run_id, first.kind, [value for entry in entries for value in entry.values]))
    except Exception as error:
        if store.lost(error):
            raise
        if len(entries) == 1:
            return [store.line(error)]
        return [reason for entry in entries for reason in _send([entry], send)]
    return []


def _line(value: object) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _remove(path: Path) -> None:
    path.unlink()
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
