"""The queue of what a run logs: nothing lost, in order, while the server comes and goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.shared.operations import outbox
from tasks.shared.operations.outbox import Entry, Outbox


class Server:
    """Keeps what is sent, unless it is away; refuses metrics named `bad`."""

    def __init__(self) -> None:
        self.away = False
        self.got: list[Any] = []
        self.requests = 0

    def __call__(self, entry: Entry) -> None:
        if self.away:
            raise ConnectionRefusedError(111, "Connection refused")
        if any(value[0] == "bad" for value in entry.values):
            raise ValueError("a name that is not taken")
        self.requests += 1
        self.got += [(entry.run_id, entry.kind, *value) for value in entry.values]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.01)
    return Server()


def metric(number: int, name: str = "loss") -> Entry:
    return Entry("r", "metrics", [[name, number, 1000 + number, number]])


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def numbers(server: Server) -> list[int]:
    return [value[3] for value in server.got if value[1] == "metrics"]


def test_the_file_is_empty_when_all_is_sent_and_gone_at_the_end(server: Server) -> None:
    queue = Outbox("r", "embed@swav", server)
    for number in range(5):
        queue.add(metric(number))
    eventually(lambda: numbers(server) == list(range(5)))
    eventually(lambda: len(queue.path.read_text().splitlines()) == 1)
    queue.close()
    assert not list(outbox.FOLDER.iterdir())


def test_what_is_queued_while_the_server_is_away_arrives_in_order_and_few_requests(server: Server, capsys: Any) -> None:
    queue = Outbox("r", "embed@swav", server)
    server.away = True
    for number in range(2500):
        queue.add(metric(number))
        if number == 1200:
            queue.add(Entry("r", "tags", [["a", "b"]]))
            eventually(lambda: bool(queue._reason))
    assert not server.got
    server.away = False
    queue.close()
    assert numbers(server) == list(range(2500))
    assert server.got.index(("r", "tags", "a", "b")) == 1201
    assert server.requests <= 6
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith("warning: tracking stopped working (connection refused); the run goes on")
    assert said[1] == "tracking works again, 2501 entries that were kept are delivered"


def test_what_is_refused_holds_up_nothing_else(server: Server, capsys: Any) -> None:
    server.away = True
    queue = Outbox("r", "embed@swav", server)
    for number in range(6):
        queue.add(metric(number, "bad" if number in (2, 3) else "loss"))
    server.away = False
    queue.close()
    assert numbers(server) == [0, 1, 4, 5]
    said = [line for line in capsys.readouterr().err.splitlines() if "refused what embed@swav" in line]
    assert said == ["warning: MLflow refused what embed@swav logged (a name that is not taken)"]


def test_what_stays_at_the_end_is_only_what_the_server_has_not_taken(server: Server, capsys: Any) -> None:
    queue = Outbox("r", "embed@swav", lambda entry: None if entry.kind == "tags" else server(entry))
    server.away = True
    queue.add(Entry("r", "tags", [["a", "b"]]))
    queue.add(metric(1))
    queue.close()
    assert "warning: tracking: 1 entries of embed@swav are kept" in capsys.readouterr().err
    server.away = False
    assert list(outbox.deliver(server)) == [("embed@swav, run r: 1 entries delivered", True)]


def test_on_a_full_disk_entries_are_sent_from_memory_and_lines_stay_whole(server: Server, capsys: Any) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, line: bytes) -> int:
            return int(self._file.write(line[: len(line) // 2]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    server.away = True
    queue = Outbox("r", "embed@swav", server)
    queue.add(metric(0))
    assert queue._file
    whole, queue._file = queue._file, Full(queue._file)  # type: ignore[assignment]
    queue.add(metric(1))
    queue._file = whole
    queue.add(metric(2))
    lines = queue.path.read_text().splitlines()
    assert [json.loads(line)[2][0][1] for line in lines[1:]] == [0, 2]
    server.away = False
    queue.close()
    assert numbers(server) == [0, 1, 2]
    assert capsys.readouterr().err.count("can not be kept on disk while it is sent (no space left on device)") == 1


def test_what_a_dead_run_left_is_delivered_and_what_a_living_one_writes_is_left_to_it(server: Server) -> None:
    server.away = True
    living = Outbox("living", "pretrain@swav", server)
    living.add(metric(0))
    dead = Outbox("r", "embed@swav", server)
    (outbox.FOLDER.parent / "report.html").write_text("then")
    dead.add(metric(1))
    dead.add_file("r", outbox.FOLDER.parent / "report.html")
    (outbox.FOLDER.parent / "report.html").write_text("later")
    dead.close()
    with dead.path.open("a") as file:
        file.write('["r", "metrics", [["loss", 2.0, 10')  # cut as the machine was lost
    taken: dict[str, Any] = {}

    def send(entry: Entry) -> None:
        taken[entry.kind] = entry.values
        if entry.kind == "artifact":
            taken["text"] = (outbox.FOLDER / entry.values[0]).read_text()

    assert list(outbox.deliver(send)) == [("embed@swav, run r: 2 entries delivered, 1 damaged lines left out", True)]
    assert taken["metrics"] == [["loss", 1, 1001, 1]]
    assert taken["text"] == "then"
    assert outbox.in_use() == [living.path]
    assert sorted(outbox.FOLDER.iterdir()) == [living.path]
    assert list(outbox.deliver(send)) == []
    server.away = False
    living.close()


def test_a_file_that_can_not_be_delivered_stays_and_sends_nothing_else_of_the_machine(server: Server) -> None:
    server.away = True
    queue = Outbox("r", "embed@swav", server)
    queue.add(Entry("r", "artifact", ["../../secret"]))
    queue.add(metric(1))
    queue.close()
    (outbox.FOLDER / "junk.jsonl").write_text("[]\n")
    sent: list[Entry] = []
    found = list(outbox.deliver(sent.append))
    assert [entry.kind for entry in sent] == ["exists", "metrics"], "no artifact from elsewhere"
    assert found[0] == (
        f"{outbox.FOLDER}/junk.jsonl is damaged and has nothing that could be delivered; remove it",
        False,
    )
    assert found[1][0] == "embed@swav, run r: 1 entries delivered, 1 damaged lines left out"
    assert (outbox.FOLDER / "junk.jsonl").exists()
