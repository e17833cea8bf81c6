"""Every file between the stages, damaged in every way: one line that names the file and the stage to run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepclust import bundle
from deepclust.errors import DeepclustError
from deepclust.models import encoder
from tasks.adapt import classifiers
from tasks.cluster.prototypes import Prototypes
from tasks.model import assign, register
from tasks.report import __main__ as report
from tasks.report import comparison
from tasks.shared.operations import last_preparation, provenance
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.observers import earlier_run
from tasks.shared.outputs import layout, lineage, prepared, read
from tests.tasks import small_run

UNUSED: Any = None
# What reads a file when its `lineage.json` is not there.
READERS: dict[str, Callable[[], object]] = {
    "artifacts/prepare/images/16/train.npy": lambda: prepared.images("train", "swav"),
    "artifacts/prepare/train/labels.npy": lambda: prepared.labels("train"),
    "artifacts/prepare/train/heldout.npy": prepared.heldout,
    "artifacts/prepare/test/items.csv": lambda: prepared.load("test", "swav"),
    "artifacts/prepare/encoders/swav.json": lambda: (prepared.statistics("swav"), _assigning()),
    "artifacts/prepare/meta.json": prepared.meta,
    "artifacts/pretrain/swav/encoder.json": lambda: encoder.load(layout.out("pretrain", "swav")),
    "artifacts/pretrain/swav/encoder.safetensors": lambda: encoder.load(layout.out("pretrain", "swav")),
    "artifacts/pretrain/swav/history.csv": lambda: report.history("swav"),
    "artifacts/pretrain/swav/projection.safetensors": lambda: Prototypes("swav", torch.device("cpu")),
    "artifacts/pretrain/swav/prototypes.safetensors": lambda: Prototypes("swav", torch.device("cpu")),
    "artifacts/embed/swav/test.npy": lambda: prepared.embeddings("swav"),
    "artifacts/cluster/swav/centroids.npy": lambda: _assigning(),
    "artifacts/cluster/swav/cluster.json": lambda: _assigning(),
    "artifacts/cluster/swav/clusters.safetensors": lambda: _assigning(),
    "artifacts/cluster/swav/assignments.csv": lambda: _pictures("swav"),
    "artifacts/cluster/swav/gallery.png": lambda: _pictures("swav"),
    "artifacts/linear/swav/classifier.json": lambda: classifiers.build("linear", "swav", UNUSED, []),
    "artifacts/linear/swav/classifier.safetensors": lambda: classifiers.build("linear", "swav", UNUSED, []),
    "artifacts/adapt/swav/table.csv": lambda: _pictures("swav"),
    "artifacts/adapt/swav/stream.csv": lambda: _pictures("swav"),
    "artifacts/adapt/swav/predictions.csv": lambda: _pictures("swav"),
    "artifacts/report/comparison.csv": comparison.table,
    **{f"metrics/{stage}/swav.json": lambda: comparison.collect(["swav"]) for stage in layout.STAGES[2:-1]},
}


def _assigning() -> bundle.Bundle:
    clusters, classifier = layout.out("cluster", "swav"), layout.out("linear", "swav")
    trained = layout.out("pretrain", "swav")
    return bundle.load(trained, clusters=clusters, classifier=classifier, statistics=layout.statistics("swav"))


def _pictures(name: str) -> None:
    """The parts of the report that read tables, without their drawing."""
    report.assignments(name, k=comparison.stage_metrics("cluster", name)["k"], images=len(prepared.labels("test")))
    report.picture(layout.out("cluster", name) / "gallery.png")
    for table, columns in report.ADAPT.items():
        read.table(layout.out("adapt", name) / table, columns)


def _cut(path: Path) -> None:
    """In the middle, but not where a line ends."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].rstrip(b"\n"))


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


def _text(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: path.write_text(change(path.read_text()))  # type: ignore[return-value]


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unfinite(array: np.ndarray) -> np.ndarray:
    array[-1, -1] = np.nan
    return array


def _json(**changes: object) -> Callable[[Path], None]:
    return _text(lambda text: json.dumps(json.loads(text) | changes))


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        first = max(tensors, key=lambda name: tensors[name].numel())
        save_file(tensors | {first: change(tensors[first])}, path)

    return damage


def _run(stage: str, patch: pytest.MonkeyPatch) -> None:
    small_run.run(stage, patch, None if stage in layout.ONCE else "swav")


ANY = {
    "missing": Path.unlink,
    "a folder": _folder,
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "cut": _cut,
}
KINDS = {
    ".npy": {
        "another type": _array(lambda array: array.astype(">f8")),
        "another shape": _array(lambda array: array[None]),
        "more than the file holds": lambda path: path.write_bytes(
            re.sub(rb"\((\d+),", rb"(9999999\1,", path.read_bytes()[:128]).replace(b" " * 7 + b"\n", b"\n")
            + path.read_bytes()[128:]
        ),
        "objects": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    },
    ".json": {
        "a list": lambda path: path.write_text("[]"),
        "a number": lambda path: path.write_text("3"),
        "no keys": lambda path: path.write_text("{}"),
        "deep": lambda path: path.write_text("[" * 100_000),
        "no number": _text(lambda text: re.sub(r"(?<=: )(\d[\d.e-]*|\[|\"\w*\")", "NaN", text, count=1)),
    },
    ".csv": {
        "no header": _text(lambda text: text.partition("\n")[2]),
        "a short row": _text(lambda text: text + "1\n"),
        "a long row": _text(lambda text: text + "," * 99 + "\n"),
        "not text": lambda path: path.write_bytes(path.read_bytes() + b"\xff\n"),
        "a NUL": lambda path: path.write_bytes(path.read_bytes() + b"\0\n"),
    },
    ".safetensors": {
        "no number": _tensor(lambda tensor: tensor * float("nan")),
        "another shape": _tensor(lambda tensor: tensor[:, :-1].contiguous()),
        "integers": _tensor(lambda tensor: tensor.to(torch.int64)),
    },
    ".png": {},
}
FILES: dict[str, dict[str, Callable[[Path], object]]] = {
    "artifacts/prepare/images/16/train.npy": {
        "other images": _array(lambda array: array[:, 1:]),
        "no images": _array(lambda array: array[:0]),
    },
    "artifacts/prepare/train/labels.npy": {
        "a row less": _array(lambda array: array[:-1]),
        "an unknown class": _array(lambda array: array + 1000),
    },
    "artifacts/prepare/train/heldout.npy": {
        "no training image": _array(lambda array: array + 10**6),
        "another order": _array(lambda array: array[::-1].copy()),
    },
    "artifacts/prepare/test/items.csv": {"a row less": _text(lambda text: text[: text[:-1].rindex("\n") + 1])},
    "artifacts/prepare/encoders/swav.json": {
        "an absurd number": _json(image_size=10**9),
        "other images": _json(image_size=28),
        "zero": _json(std=[0.0, 0.0, 0.0]),
        "an unknown word": _json(resize="zoom"),
    },
    "artifacts/prepare/meta.json": {"another type": _json(classes={"a": 1})},
    "artifacts/pretrain/swav/encoder.json": {
        "an absurd number": _json(image_size=10**9),
        "another dimension": _json(feature_dim=7),
        "an unknown network": _json(backbone="resnet19"),
        "an unknown stem": _json(stem="large"),
        "no channels": _json(channels=0),
        "other channels": _json(channels=1, network_channels=1, mean=[0.5], std=[0.5]),
        "text": _json(mean=["0.5", "0.5", "0.5"]),
        "too many channels": _json(network_channels=10**9),
    },
    "artifacts/embed/swav/test.npy": {
        "a row less": _array(lambda array: array[:-1]),
        "another dimension": _array(lambda array: array[:, :-1]),
        "NaN": _array(_unfinite),
        "infinity": _array(lambda array: np.full_like(array, np.inf)),
    },
    "artifacts/cluster/swav/centroids.npy": {
        "a row less": _array(lambda array: array[:-1]),
        "another dimension": _array(lambda array: array[:, :-1]),
        "NaN": _array(_unfinite),
    },
    "artifacts/cluster/swav/cluster.json": {
        "zero": _json(k=0),
        "text": _json(normalise="yes"),
        "an unknown kind": _json(kind="trees"),
        "a threshold in words": _json(reject="low"),
        "another number of refits": _json(refits=10**6),
    },
    "artifacts/cluster/swav/assignments.csv": {
        "a row less": _text(lambda text: text[: text[:-1].rindex("\n") + 1]),
        "an unknown cluster": _text(lambda text: re.sub(r"(?m)^(test,\d+,[^,]*),\d+,", r"\1,99,", text)),
        "text": _text(lambda text: re.sub(r"(?m)^test,\d+", "test,x", text)),
    },
    "artifacts/linear/swav/classifier.json": {"a class less": _json(classes=["a"]), "numbers": _json(classes=[1, 2])},
    "artifacts/adapt/swav/table.csv": {"text": _text(lambda text: re.sub(r"0\.\d+", "half", text))},
    "artifacts/adapt/swav/stream.csv": {"infinity": _text(lambda text: re.sub(r"0\.\d+", "1e999", text))},
    "artifacts/pretrain/swav/history.csv": {"text": _text(lambda text: re.sub(r"0\.\d+", "half", text))},
    "metrics/cluster/swav.json": {
        "an absurd number": _json(k=-1),
        "another type": _json(acc=[0.5]),
        "text inside": _json(other_k={"4": {"acc": {"mean": "high", "std": 0.0}}}),
        "no number of clusters": _json(other_k={"four": {}}),
    },
    "metrics/linear/swav.json": {"above 1": _json(linear=3.0), "an unknown name": _json(all={"knn": 0.5})},
    "metrics/adapt/swav.json": {"another type": _json(guard=[1]), "text": _json(errors={"bn": "0.5"})},
}
CASES = [
    pytest.param(file, damage, id=f"{file} {name}")
    for file in READERS
    for name, damage in {**ANY, **KINDS[Path(file).suffix], **FILES.get(file, {})}.items()
]


@pytest.fixture(scope="module")
def copy(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every stage ran, without what tells a file's hash."""
    root = shutil.copytree(labelled, tmp_path_factory.mktemp("files") / "copy")
    for path in root.rglob(lineage.FILE):
        path.unlink()
    return root


@pytest.fixture
def whole(copy: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the workspace, where one file is put back at the end."""
    monkeypatch.chdir(copy)
    path = Path(request.param)
    content = path.read_bytes()
    yield
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)


@pytest.mark.parametrize(("whole", "damage"), CASES, indirect=["whole"])
def test_damage_is_one_line_with_the_file_and_the_stage(
    whole: None, damage: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    path = Path(request.node.callspec.params["whole"])
    READERS[path.as_posix()]()
    damage(path)
    with pytest.raises(DeepclustError) as caught:
        READERS[path.as_posix()]()
    line, stage = str(caught.value), layout.stage_of(path)
    assert "\n" not in line
    assert path.name in line or path.parent.as_posix() in line
    assert re.search(rf"run (`dvc repro {stage}`|(its )?(embed and )?{stage.partition('@')[0]}\b)", line), line
    assert len(line) < 500


def test_what_only_tells_of_an_earlier_run_does_not_stop_a_new_one(here: Path, tmp_path: Path) -> None:
    now = shutil.copytree(layout.PREPARED, tmp_path / "now")
    history = layout.out("pretrain", "swav") / "history.csv"
    assert earlier_run._epochs(history) == "2"
    for path in (history, layout.split("train") / "heldout.npy", layout.split("test") / "items.csv", layout.META):
        content = path.read_bytes()
        for damage in ANY.values():
            damage(path)
            assert earlier_run._epochs(history) in ("", "2")
            assert last_preparation.warning(now) is None
            assert provenance.data_hash() is None or path != layout.META
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def _assign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sys.argv", ["assign", "--encoder", "swav", "images/kind1", "--out", "table.csv"])
    assign.main()


def _register(patch: pytest.MonkeyPatch) -> None:
    with errors_as_one_line():
        register.register("swav")


COMMANDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{stage: partial(_run, stage) for stage in ("embed", "cluster", "linear", "adapt", "report")},
    "assign": _assign,
    "register": _register,
}


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("embed", "artifacts/prepare/images/16/test.npy"),
        ("cluster", "artifacts/embed/swav/train.npy"),
        ("linear", "artifacts/prepare/train/labels.npy"),
        ("adapt", "artifacts/cluster/swav/centroids.npy"),
        ("report", "artifacts/adapt/swav/predictions.csv"),
        ("report", "metrics/cluster/swav.json"),
        ("report", "plots/adapt/swav.csv"),
        ("assign", "artifacts/pretrain/swav/encoder.safetensors"),
        ("assign", "artifacts/prepare/encoders/swav.json"),
        ("register", "artifacts/linear/swav/classifier.safetensors"),
        ("register", "artifacts/prepare/meta.json"),
        ("register", "metrics/linear/swav.json"),
    ],
)
def test_a_flipped_bit_or_a_missing_file_is_found_by_its_hash_before_anything_is_computed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, file: str
) -> None:
    path, before = Path(file), sorted(here.rglob("*"))
    stage = layout.stage_of(path)
    _flip(path)
    with pytest.raises(SystemExit, match="2"):
        COMMANDS[command](monkeypatch)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: expected {file} as {stage} wrote it (SHA-256 ")
    assert line.endswith(
        f"; remove it and run `dvc repro {stage}`, after `python -m tasks.verify` if that restores the damage"
    )
    assert sorted(here.rglob("*")) == before
    path.unlink()
    with pytest.raises(SystemExit, match="2"):
        COMMANDS[command](monkeypatch)
    found = capsys.readouterr().err
    assert re.fullmatch(rf"error: expected {file}.*, found none; run `dvc repro.*`\n", found), found


def test_files_that_a_command_does_not_read_and_those_beside_them_do_not_stop_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _flip(layout.out("cluster", "swav") / "gallery.png")
    _flip(layout.out("pretrain", "swav") / "history.csv")
    _flip(layout.metrics("linear", "swav"))
    (layout.out("linear", "swav") / "notes.txt").write_text("mine")
    _assign(monkeypatch)
    assert Path("table.csv").exists()


@pytest.mark.parametrize("stage", ["cluster", "linear"])
def test_embeddings_that_are_not_finite_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    path = layout.embeddings("swav", "train")
    np.save(path, _unfinite(np.load(path)))
    (path.parent / lineage.FILE).unlink()
    with pytest.raises(SystemExit, match="2"):
        _run(stage, monkeypatch)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"finite numbers in \S+train.npy, got NaN or infinity in row \d+; remove it and run", line)


def test_an_encoder_of_images_of_another_size_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = layout.out("pretrain", "swav")
    _json(image_size=20)(folder / "encoder.json")
    (folder / lineage.FILE).unlink()
    with pytest.raises(SystemExit, match="2"):
        _run("embed", monkeypatch)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("images (16, 16, 3), got one of (20, 20, 3); run `dvc repro pretrain@swav`")
