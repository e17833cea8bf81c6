"""A saved state comes back bit for bit, or not at all; whatever moment a run is killed in, one whole state stays."""

import errno
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepclust.errors import CheckpointError
from deepclust.training import checkpoint, optim

FINGERPRINT = {"method": "swav", "parameters": "a1", "data": "b2", "code": "c3"}
SCHEDULE = optim.Schedule(rate=0.4, final_rate=0.0, warmup_steps=2, total_steps=6)
FILES = ["manifest.json", "state.json", "tensors.safetensors"]
DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


def store(folder: Path, *, keep: int = 2, **parts: str) -> checkpoint.Store:
    return checkpoint.Store(folder / "state", fingerprint=FINGERPRINT | parts, keep=keep)


def saved_in(folder: Path) -> checkpoint.Saved:
    """The newest state of a folder that has one."""
    saved = store(folder).newest()
    assert saved is not None
    return saved


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3, 2), float(step)), "loss": step / 7}


def filled(folder: Path, *steps: int, keep: int = 2) -> Path:
    """The folder of the last of some saved steps."""
    for step in steps:
        store(folder, keep=keep).save(step, state(step))
    return folder / "state" / f"step-{steps[-1]:08d}"


def step_in(folder: Path) -> int:
    """The step that is found, after a look at what it holds."""
    saved = saved_in(folder)
    assert bits(saved.state) == bits(state(saved.step))
    return saved.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def bits(value: Any) -> Any:
    """A tree as what can be compared: equal in type, order and every bit; lists and tuples count as the same."""
    if isinstance(value, Tensor):
        memory = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return value.dtype, value.shape, memory
    if isinstance(value, dict):
        return [(type(key), key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [list, *map(bits, value)]
    return type(value), struct.pack(">d", value) if isinstance(value, float) else value


def some_bits(chance: random.Random, dtype: torch.dtype) -> Tensor:
    shape = chance.choice([(), (0,), (3, 0, 2), (1,), (5,), (4, 6), (2, 3, 4, 5)])
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def a_tree(chance: random.Random, depth: int = 4) -> Any:
    if depth and chance.random() < 0.7:
        children = [a_tree(chance, depth - 1) for _ in range(chance.randrange(6))]
        keys = ["", "a.b", "tensor", "float", "ü\ud800/..", 0, -3, 10**30, "0"]
        keyed = dict(zip(chance.sample(keys, len(children)), children, strict=True))
        return chance.choice([keyed, children, tuple(children)])
    any_float = struct.unpack(">d", chance.randbytes(8))[0]
    return chance.choice(
        [None, True, False, 0, -(2**200), "", "line\n\0\u2028", any_float, any_float, -0.0, 5e-324, float("inf")]
        + [struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0], some_bits(chance, chance.choice(DTYPES))] * 3
    )


def test_a_tree_comes_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    for step in range(20):
        tree = {"tree": [a_tree(chance) for _ in range(5)], "every": [some_bits(chance, dtype) for dtype in DTYPES]}
        store(tmp_path).save(step, tree, processes=step + 1)
        saved = saved_in(tmp_path)
        assert (saved.step, saved.processes) == (step, step + 1)
        assert bits(saved.state) == bits(tree)


def test_views_and_entries_that_share_memory_come_back_as_their_own_values(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    picture = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    turned = torch.randn(3, dtype=torch.complex64).conj()
    # `bits` reads the memory, in which a conjugate is not resolved.
    tree = {
        "whole": [whole, whole, whole.t(), whole[:, ::2], whole[1:], whole[:0], whole[0].expand(3, 6), picture],
        "parameter": nn.Parameter(whole).clone(),
    }
    store(tmp_path).save(1, tree | {"turned": turned})
    found = saved_in(tmp_path).state
    assert torch.equal(found.pop("turned"), turned)
    assert bits(found) == bits(tree)
    found["whole"][0].zero_()
    assert torch.equal(found["whole"][1], whole)


@pytest.mark.parametrize("settings", [optim.SGD(), optim.LARS(), optim.LARS(name="larc"), optim.AdamW()])
def test_a_saved_optimiser_goes_on_bit_for_bit(tmp_path: Path, settings: optim.Optimiser) -> None:
    def train(net: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optim.set_rate(optimiser, SCHEDULE, step)
            optimiser.zero_grad()
            net(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimiser.step()

    net, again = nn.Linear(3, 4), nn.Linear(3, 4)
    ours, theirs = (optim.build(settings, [{"params": each.parameters()}]) for each in (net, again))
    train(net, ours, range(3))
    store(tmp_path).save(3, {"net": net.state_dict(), "optimiser": ours.state_dict()})
    again.load_state_dict(saved_in(tmp_path).state["net"])
    theirs.load_state_dict(saved_in(tmp_path).state["optimiser"])
    train(net, ours, range(3, 6))
    train(again, theirs, range(3, 6))
    assert bits(again.state_dict()) == bits(net.state_dict())


def test_what_would_not_come_back_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    tensors = [
        torch.zeros(2).to_sparse(),
        torch.zeros(2, dtype=torch.complex128),
        torch.zeros(2).to(torch.float8_e8m0fnu),
    ]
    for value in [object(), {1, 2}, b"bytes", {(1, 2): 3}, {True: 1}, 1j, *tensors]:
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
            store(tmp_path).save(2, {"a": [0, value]})
    assert names(tmp_path) == ["step-00000001"]


def test_no_state_is_none_and_reading_makes_and_removes_nothing(tmp_path: Path) -> None:
    assert store(tmp_path).newest() is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "state" / ".step-00000004.partial").mkdir(parents=True)
    assert store(tmp_path).newest() is None
    assert names(tmp_path) == [".step-00000004.partial"]


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
    file.unlink()
    assert step_in(tmp_path) == 1

    (tmp_path / "state" / "step-00000001" / name).unlink()
    with pytest.raises(CheckpointError, match=r"^expected a whole state .*step-00000001"):
        store(tmp_path).newest()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], tree: bytes | None = None) -> None:
    """Change a state as someone would who knows the format: with hashes that hold."""
    if tree is not None:
        (folder / "state.json").write_bytes(tree)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": seal}, indent=2, sort_keys=True))


def test_a_newer_version_asks_for_an_upgrade_and_nothing_older_is_taken(tmp_path: Path) -> None:
    rewrite(filled(tmp_path, 1, 2), lambda manifest: manifest.update(version=2, other=1))
    with pytest.raises(CheckpointError, match="version 1 or older, got 2; upgrade deepclust"):
        store(tmp_path).newest()


@pytest.mark.parametrize("name", ["../outside.json", "more.json"])
def test_a_manifest_that_names_other_files_or_another_step_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def hostile(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}

    filled(tmp_path, 1).rename(tmp_path / "state" / "step-00000007")
    rewrite(filled(tmp_path, 8), hostile)
    (tmp_path / "state" / "outside.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a whole state"):
        store(tmp_path).newest()
    assert capsys.readouterr().err.count("manifest.json is of something else") == 2


@pytest.mark.parametrize(
    "tree",
    [
        b'{"list": [{"tensor": "0"}, {"tensor": "0"}]}',
        b'{"list": []}',
        b'{"list": [{"tensor": "0"}], "more": 1}',
        b'{"list": [{"tensor": "0"}, {"python": "exit()"}]}',
        b'{"dict": [[[], {"tensor": "0"}]]}',
        b'{"list": [' * 9999,
    ],
)
def test_a_tree_that_does_not_fit_its_tensors_is_damaged(tmp_path: Path, tree: bytes) -> None:
    store(tmp_path).save(1, {"weights": torch.ones(2)})
    folder = tmp_path / "state" / "step-00000001"
    rewrite(folder, lambda _: None, b'{"list": [{"tensor": "0"}]}')
    assert store(tmp_path).newest() is not None  # so that it is the tree which is refused
    rewrite(folder, lambda _: None, tree)
    with pytest.raises(CheckpointError, match="expected a whole state"):
        store(tmp_path).newest()


def test_a_size_is_compared_before_a_byte_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(filled(tmp_path, 1) / "tensors.safetensors", 2**40)  # sparse
    read: list[str] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), whole(path))[1])
    with pytest.raises(CheckpointError, match="1099511627776 bytes"):
        store(tmp_path).newest()
    assert read == ["manifest.json", "state.json"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"method": "pcl"}, r"got one of another method \(expected pcl, got swav\);"),
        ({"code": "x", "data": "y"}, "got one of other data, of other code;"),
        ({"device": "cuda"}, "got one of other device;"),
    ],
)
def test_a_state_of_another_run_names_the_parts_that_differ(tmp_path: Path, parts: dict[str, str], said: str) -> None:
    filled(tmp_path, 1)
    with pytest.raises(CheckpointError, match=said):
        store(tmp_path, **parts).newest()
    assert step_in(tmp_path) == 1
    if "device" in parts:  # and where only the saved state has the part
        store(tmp_path, **parts).save(2, state(2))
        with pytest.raises(CheckpointError, match=said):
            store(tmp_path).newest()


def test_the_newest_k_stay_and_a_later_step_of_a_run_gone_back_in_does_not_win(tmp_path: Path) -> None:
    filled(tmp_path, 3, 6, 99999999, 100000000, keep=3)
    assert names(tmp_path) == ["step-00000006", "step-100000000", "step-99999999"]
    assert step_in(tmp_path) == 100000000
    filled(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007"]


def test_after_going_back_the_last_saved_is_the_newest_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    ours = store(tmp_path)

    def damage(step: int) -> None:
        (tmp_path / "state" / f"step-{step:08d}" / "state.json").unlink()

    def newest() -> int:
        saved = ours.newest()
        assert saved is not None
        return saved.step

    for step in (3, 6, 9):
        ours.save(step, state(step))
    damage(9)
    assert newest() == 6
    ours.save(7, state(7))
    assert step_in(tmp_path) == 7
    damage(7)
    assert newest() == 6
    ours.save(8, state(8))
    assert names(tmp_path) == ["step-00000006", "step-00000008"]
    damage(8)
    assert newest() == 6
    ours.save(8, state(8))  # whole again, so it counts again
    ours.save(9, state(9))
    assert names(tmp_path) == ["step-00000008", "step-00000009"]


def test_clear_removes_states_only(tmp_path: Path) -> None:
    store(tmp_path).clear()
    filled(tmp_path, 1, 2)
    (tmp_path / "state" / ".step-00000003.partial").mkdir()
    (tmp_path / "state" / "preempted").touch()
    store(tmp_path).clear()
    assert names(tmp_path) == ["preempted"]
    assert store(tmp_path).newest() is None


def test_everything_is_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    names_of = lambda opened: Path(f"/proc/self/fd/{opened}").readlink().name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda opened: (events.append(names_of(opened)), fsync(opened))[1])
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append(f"rename {path.name}"), rename(path, to))[1])
    store(tmp_path).save(1, state(1))
    assert sorted(events[:3]) == FILES
    assert events[3:] == [".step-00000001.partial", "rename .step-00000001.partial", "state"]


def moments(monkeypatch: pytest.MonkeyPatch, at: int | None, fail: Callable[[], None]) -> list[str]:
    """Let `fail` raise at one of the moments of changing the disk: before, amid and after each change."""
    passed: list[str] = []

    def moment(name: str) -> None:
        passed.append(name)
        if len(passed) - 1 == at:
            fail()

    def around(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def changed(*args: Any, **options: Any) -> Any:
            moment(f"before {name}")
            result = whole(*args, **options)
            moment(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, changed)

    def write(path: Path, data: bytes) -> None:
        moment("before write")
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            moment("amid write")
            file.write(data[len(data) // 2 :])
        moment("after write")

    def rmtree(path: Path) -> None:
        for file in sorted(path.iterdir(), reverse=True):
            moment("amid rmtree")
            file.unlink()
        path.rmdir()

    around(Path, "rename")
    around(Path, "mkdir")
    around(os, "fsync")
    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return passed


def killed() -> None:
    raise Killed


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, tree: Any, fail: Callable[[], None]
) -> Iterator[Path]:
    """Copies of a folder, each after a save that failed at another moment."""
    for at in range(200):
        copy = folder.parent / f"{folder.name}-{at}"
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patched:
            passed = moments(patched, at, fail)
            try:
                store(copy, keep=1).save(step, tree)
            except (Killed, CheckpointError) as error:
                stopped: BaseException | None = error
            else:
                stopped = None
        if stopped is None:
            assert len(passed) == at > 15  # every moment there is had its turn
            return
        if fail is full:
            assert isinstance(stopped, CheckpointError)
            assert str(stopped).startswith(f"expected to save step {step}")
            assert "No space left on device; make room" in str(stopped)
        yield copy
    raise AssertionError("a save has fewer moments")


@pytest.mark.parametrize("step", [1, 2], ids=["the same step", "another step"])
@pytest.mark.parametrize("fail", [killed, full])
def test_whenever_a_save_fails_a_whole_state_stays_and_saving_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    fail: Callable[[], None],
) -> None:
    first, second = {"state": "first", "at": torch.arange(9)}, {"state": "second", "at": torch.ones(2)}
    store(tmp_path / "run").save(1, first)
    found: list[str] = []
    for folder in saves(tmp_path / "run", monkeypatch, step, second, fail):
        saved = saved_in(folder)
        assert bits(saved.state) == bits(first if saved.state["state"] == "first" else second)
        assert saved.step == (1 if saved.state["state"] == "first" else step)
        found.append(saved.state["state"])
        assert capsys.readouterr().err == ""
        if fail is full and saved.state["state"] == "first":
            assert names(folder) == ["step-00000001"]
        filled(folder, 3, keep=1)
        assert names(folder) == ["step-00000003"]
        assert step_in(folder) == 3
    assert found == sorted(found)  # once the second is there, it stays
    assert set(found) == {"first", "second"}


def test_a_save_killed_twice_still_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / "run").save(1, {"saved": 1})
    for count, folder in enumerate(saves(tmp_path / "run", monkeypatch, 1, {"saved": 2}, killed)):
        if count % 5 == 0:
            for again in saves(folder, monkeypatch, 1, {"saved": 3}, killed):
                assert saved_in(again).state["saved"] in (1, 2, 3)


def test_a_clear_that_is_killed_leaves_whole_states_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for at in range(20):
        folder = tmp_path / str(at)
        filled(folder, 1, 2)
        with monkeypatch.context() as patched:
            passed = moments(patched, at, killed)
            try:
                store(folder).clear()
            except Killed:
                pass
            else:
                assert len(passed) == at > 8
                return
        assert store(folder).newest() is None or step_in(folder) == 2
        assert capsys.readouterr().err == ""
    raise AssertionError("a clear has fewer moments")


def test_a_folder_that_is_none_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    for action in (lambda: store(tmp_path).save(1, {}), store(tmp_path).newest, store(tmp_path).clear):
        with pytest.raises(CheckpointError, match=r"^expected to [^\n]*$"):
            action()


def test_restored_tensors_have_the_layout_of_those_they_replace() -> None:
    like = nn.Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last))
    loaded = torch.randn(2, 3, 4, 5)
    found = checkpoint.restore_like(loaded, like)
    assert torch.equal(found, loaded)
    assert (found.stride(), found.dtype, found.requires_grad) == (like.stride(), torch.float32, False)
    assert checkpoint.restore_like(loaded.bool(), like.permute(0, 3, 1, 2).permute(0, 2, 3, 1)).dtype == torch.bool
    assert checkpoint.restore_like(torch.tensor(2), torch.tensor(0.5)).item() == 2
    transposed = torch.zeros(5, 4).t()
    assert checkpoint.restore_like(torch.ones(4, 5), transposed).stride() == (1, 4) != torch.ones(4, 5).stride()
    with pytest.raises(CheckpointError, match=r"expected .* \(4, 5\), got \(1, 5\)"):
        checkpoint.restore_like(torch.ones(1, 5), transposed)
