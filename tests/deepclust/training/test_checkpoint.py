"""A saved state comes back bit for bit, or not at all; whatever moment a run is killed in, one whole state stays."""

import errno
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepclust.errors import CheckpointError
from deepclust.training import checkpoint

FINGERPRINT = {"method": "swav", "parameters": "a1", "data": "b2", "code": "c3"}
FILES = ["manifest.json", "state.json", "tensors.safetensors"]
DTYPES = [
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


def store(folder: Path, *, keep: int = 2, **parts: str) -> checkpoint.Store:
    return checkpoint.Store(folder / "state", fingerprint=FINGERPRINT | parts, keep=keep)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3, 2), float(step)), "loss": step / 7}


def filled(folder: Path, *steps: int, keep: int = 2) -> Path:
    """The folder of the last of some saved steps."""
    for step in steps:
        store(folder, keep=keep).save(step, state(step))
    return folder / "state" / f"step-{steps[-1]:08d}"


def newest(ours: checkpoint.Store) -> checkpoint.Saved:
    saved = ours.newest()
    assert saved is not None
    return saved


def step_in(folder: Path) -> int:
    """The step that is found, after a look at what it holds."""
    saved = newest(store(folder))
    assert bits(saved.state) == bits(state(saved.step))
    return saved.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def bits(value: Any) -> Any:
    """A tree as what can be compared: equal in type, order and every bit; lists and tuples count as the same."""
    if isinstance(value, Tensor):
        own = value.detach().resolve_conj().contiguous().reshape(-1)
        return value.dtype, value.shape, own.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(type(key), key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [list, *map(bits, value)]
    return type(value), struct.pack(">d", value) if isinstance(value, float) else value


def test_a_tree_comes_back_bit_for_bit_and_entries_that_share_memory_as_their_own_values(tmp_path: Path) -> None:
    raw = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.arange(24.0).reshape(4, 6)
    tree = {
        "dtypes": [raw > 99, *(raw.view(dtype) for dtype in DTYPES)],
        "shapes": [torch.tensor(0.5), torch.zeros(0), torch.zeros(3, 0, 2)],
        "views": [whole, whole, whole.t(), whole[:, ::2], whole[1:], whole[0].expand(3, 6), nn.Parameter(whole)],
        "others": [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.full((3,), 2j).conj()],
        "scalars": [None, True, False, 0, 1, -(2**200), "", "line\n\0\u2028\ud800", 0.1, -0.0, 5e-324, float("inf")],
        "nan": struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0],
        "keys": {"": 1, "a.b": (2, [], {}), "tensor": {"float": 3}, "0": 4, 0: 5, -3: (), 10**30: [[None]]},
    }
    store(tmp_path).save(3, tree, processes=2)
    saved = newest(store(tmp_path))
    assert (saved.step, saved.processes) == (3, 2)
    assert bits(saved.state) == bits(tree)
    saved.state["views"][0].zero_()
    assert torch.equal(saved.state["views"][1], whole)


def test_what_would_not_come_back_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    refused = [torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex128), {(1, 2): 3}, {True: 1}]
    for value in [object(), {1, 2}, b"bytes", 1j, *refused]:
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
            store(tmp_path).save(2, {"a": [0, value]})
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = filled(tmp_path, 1, 2) / name
    whole = file.read_bytes()
    # Cut, longer, or with one bit flipped, at every place.
    flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    for changed in [b"", whole[: len(whole) // 2], whole[:-1], whole + b" ", *flipped]:
        file.write_bytes(changed)
        assert step_in(tmp_path) == 1
        (warned,) = capsys.readouterr().err.splitlines()
        assert "step-00000002 is damaged" in warned
    (tmp_path / "state" / "step-00000001" / name).unlink()
    with pytest.raises(CheckpointError, match=r"^expected a whole state .*step-00000001"):
        store(tmp_path).newest()


def test_a_newer_version_asks_for_an_upgrade_and_a_manifest_of_other_files_or_another_step_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rewrite(folder: Path, **changes: Any) -> None:
        """As someone would who knows the format: with a hash that holds."""
        body = json.loads((folder / FILES[0]).read_text())
        del body["sha256"]
        (folder / FILES[0]).write_bytes(checkpoint._sealed(body | changes))

    rewrite(filled(tmp_path, 1, 2), version=2, other=1)
    with pytest.raises(CheckpointError, match="version 1 or older, got 2; upgrade deepclust"):
        store(tmp_path).newest()  # and takes nothing older

    first = filled(tmp_path, 1)
    rewrite(filled(tmp_path, 2), step=7)
    rewrite(first, files={name: {} for name in [*FILES[1:], "../outside.json"]})
    with pytest.raises(CheckpointError, match="expected a whole state"):
        store(tmp_path).newest()
    assert capsys.readouterr().err.count("manifest.json is of something else") == 2


def test_a_state_of_another_run_names_the_parts_that_differ(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    for parts, said in [
        ({"method": "pcl"}, r"got one of another method \(expected pcl, got swav\);"),
        ({"code": "x", "data": "y", "device": "cuda"}, "got one of other data, of other code, of other device;"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            store(tmp_path, **parts).newest()
    assert step_in(tmp_path) == 1
    store(tmp_path, device="cuda").save(2, state(2))
    with pytest.raises(CheckpointError, match="got one of other device;"):  # which only the saved state has
        store(tmp_path).newest()


def test_the_newest_k_stay_and_a_later_step_of_a_run_gone_back_in_does_not_win(tmp_path: Path) -> None:
    filled(tmp_path, 3, 6, 99999999, 100000000, keep=3)
    assert names(tmp_path) == ["step-00000006", "step-100000000", "step-99999999"]
    assert step_in(tmp_path) == 100000000
    filled(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007"]
    ours = store(tmp_path)
    for step in (10, 9, 8):  # and damaged ones do not count
        ours.save(step, state(step))
        assert newest(ours).step == step
        (tmp_path / "state" / f"step-{step:08d}" / "state.json").unlink()
        assert newest(ours).step == 7
    ours.save(8, state(8))  # whole again
    ours.save(9, state(9))
    assert names(tmp_path) == ["step-00000008", "step-00000009"]


def test_reading_makes_and_removes_nothing_and_clearing_removes_states_only(tmp_path: Path) -> None:
    store(tmp_path).clear()
    assert store(tmp_path).newest() is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "state" / ".step-00000003.partial").mkdir(parents=True)
    (tmp_path / "state" / "preempted").touch()
    assert store(tmp_path).newest() is None
    assert names(tmp_path) == [".step-00000003.partial", "preempted"]
    filled(tmp_path, 1, 2)
    store(tmp_path).clear()
    assert names(tmp_path) == ["preempted"]


def test_everything_is_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    name = lambda fd: Path(f"/proc/self/fd/{fd}").readlink().name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(name(fd)), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append(f"rename {path.name}"), rename(path, to)))
    filled(tmp_path, 1)
    assert sorted(events[:3]) == FILES
    assert events[3:] == [".step-00000001.partial", "rename .step-00000001.partial", "state"]


def fail_at(at: int, error: BaseException, patched: pytest.MonkeyPatch) -> None:
    """Raise once, at one of the moments of changing the disk: before, amid and after each change."""
    count = itertools.count()

    def moment() -> None:
        if next(count) == at:
            raise error

    def around(owner: Any, name: str, whole: Callable[..., Any]) -> None:
        def changed(*args: Any, **options: Any) -> Any:
            moment()
            result = whole(*args, **options)
            moment()
            return result

        patched.setattr(owner, name, changed)

    def write(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            moment()
            file.write(data[len(data) // 2 :])

    def rmtree(path: Path) -> None:
        for file in sorted(path.iterdir(), reverse=True):
            moment()
            file.unlink()
        path.rmdir()

    changes = [(Path, "rename", Path.rename), (Path, "mkdir", Path.mkdir), (os, "fsync", os.fsync)]
    for owner, name, whole in [*changes, (Path, "write_bytes", write), (shutil, "rmtree", rmtree)]:
        around(owner, name, whole)


def failures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, action: Callable[[checkpoint.Store], None]
) -> Iterator[Path]:
    """Copies of a folder, each after an action that failed at another moment, until all moments had their turn."""
    for at in itertools.count():
        copy = folder.parent / f"{folder.name}-{at}"
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patched:
            fail_at(at, error, patched)
            try:
                action(store(copy, keep=1))
            except (Killed, CheckpointError) as stopped:
                told = str(stopped)
            else:
                assert at > 8
                return
        assert ("No space left on device; make room" in told) == (error is FULL)
        yield copy


@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "another step"])
@pytest.mark.parametrize("error", [Killed(), FULL], ids=["killed", "full"])
def test_whenever_a_save_fails_a_whole_state_stays_and_saving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int, error: BaseException
) -> None:
    first, second, found = {"state": "first", "at": torch.arange(9)}, {"state": "second", "at": torch.ones(2)}, []
    store(tmp_path / "run").save(1, first)
    for count, folder in enumerate(failures(tmp_path / "run", monkeypatch, error, lambda run: run.save(step, second))):
        saved = newest(store(folder))
        found.append(saved.state["state"])
        assert bits(saved.state) == bits(first if found[-1] == "first" else second)
        assert saved.step == (1 if found[-1] == "first" else step)
        assert capsys.readouterr().err == ""
        if error is FULL and found[-1] == "first":
            assert names(folder) == ["step-00000001"]
        if count % 5 == 0 and error is not FULL:  # killed twice
            for again in failures(folder, monkeypatch, error, lambda run: run.save(step, second)):
                assert newest(store(again)).state["state"] in ("first", "second")
        filled(folder, 3, keep=1)
        assert names(folder) == ["step-00000003"]
        assert step_in(folder) == 3
    assert found == sorted(found)  # once the second is there, it stays
    assert set(found) == {"first", "second"}


def test_a_clear_that_is_killed_leaves_whole_states_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "run", 1, 2)
    for folder in failures(tmp_path / "run", monkeypatch, Killed(), checkpoint.Store.clear):
        assert store(folder).newest() is None or step_in(folder) == 2
    assert capsys.readouterr().err == ""


def test_restored_tensors_have_the_layout_of_those_they_replace() -> None:
    like = nn.Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last))
    loaded = torch.randn(2, 3, 4, 5)
    found = checkpoint.restore_like(loaded, like)
    assert torch.equal(found, loaded)
    assert (found.stride(), found.dtype, found.requires_grad) == (like.stride(), torch.float32, False)
    assert checkpoint.restore_like(torch.ones(4, 5), torch.zeros(5, 4).t()).stride() == (1, 4)
    with pytest.raises(CheckpointError, match=r"expected .* \(4, 5\), got \(1, 5\)"):
        checkpoint.restore_like(torch.ones(1, 5), torch.zeros(4, 5))
