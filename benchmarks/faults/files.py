"""Faults of the files between the stages: each file × each damage × each command that reads the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.cases import EITHER, Case
from benchmarks.faults.damage import ANY, CONTENT, Damage, nan, sign, with_value, without
from benchmarks.faults.workspace import ENCODER, STAGES


@dataclass(frozen=True)
class File:
    """A file between stages.

    Attributes:
        path: Relative to the workspace; `*` stands for the encoder.
        readers: The commands that read it.
        values: Damage that only this file can have.
        signed: Whether `lineage.json` holds its hash.
    """

    path: str
    readers: str
    values: Mapping[str, Damage] = field(default_factory=dict)
    signed: bool = True


def _without(*names: str) -> dict[str, Damage]:
    return {f"no {name}": without(name) for name in names}


def _is(*keys: str, value: object, name: str = "") -> dict[str, Damage]:
    return {f"{'.'.join(keys)} {name or value}": with_value(*keys, value=value)}


FILES = (
    File("artifacts/prepare/images/16/train.npy", "pretrain embed cluster adapt"),
    File("artifacts/prepare/images/16/test.npy", "embed cluster adapt register"),
    File("artifacts/prepare/train/labels.npy", "cluster linear"),
    File("artifacts/prepare/test/labels.npy", "cluster linear adapt report"),
    File("artifacts/prepare/train/heldout.npy", "linear"),
    File("artifacts/prepare/train/items.csv", "cluster"),
    File("artifacts/prepare/test/items.csv", "cluster adapt"),
    File(
        f"artifacts/prepare/encoders/{ENCODER}.json",
        "pretrain adapt assign register",
        _without("mean", "image_size", "white")
        | _is("image_size", value=10**9)
        | _is("image_size", value=-1)
        | _is("channels", value=7)
        | _is("mean", value=[float("nan")] * 3)
        | _is("std", value=[0.0] * 3)
        | _is("resize", value="no such way"),
    ),
    File(
        "artifacts/prepare/meta.json",
        "pretrain cluster linear adapt report register",
        _without("classes", "content_hash") | _is("classes", value=[1, None, []]) | _is("classes", value="abc"),
    ),
    File(
        "artifacts/pretrain/*/encoder.json",
        "embed cluster adapt assign register",
        _without("image_size", "backbone")
        | _is("image_size", value=10**9)
        | _is("image_size", value=0)
        | _is("channels", value=10**6)
        | _is("backbone", value="no such network")
        | _is("backbone", value="../../etc"),
    ),
    File("artifacts/pretrain/*/encoder.safetensors", "embed adapt assign register"),
    File("artifacts/pretrain/*/prototypes.safetensors", "cluster"),
    File("artifacts/pretrain/*/projection.safetensors", "cluster"),
    File("artifacts/pretrain/*/history.csv", "report"),
    File("artifacts/embed/*/train.npy", "cluster linear", {"NaN": nan}),
    File("artifacts/embed/*/test.npy", "cluster linear report", {"NaN": nan}),
    File("artifacts/cluster/*/centroids.npy", "adapt assign register", {"NaN": nan}),
    File(
        "artifacts/cluster/*/cluster.json",
        "adapt assign register",
        _without("normalise") | _is("normalise", value="perhaps") | _is("k", value=10**12) | _is("kind", value="trees"),
    ),
    File("artifacts/cluster/*/clusters.safetensors", "adapt assign register"),
    File("artifacts/cluster/*/assignments.csv", "report"),
    File("artifacts/cluster/*/gallery.png", "report"),
    File(
        "artifacts/linear/*/classifier.json",
        "adapt assign register",
        _without("classes") | _is("classes", value=["a"]) | _is("classes", value=[1, 2, 3]),
    ),
    File("artifacts/linear/*/classifier.safetensors", "adapt assign register"),
    File("artifacts/adapt/*/table.csv", "report"),
    File("artifacts/adapt/*/stream.csv", "report"),
    File("artifacts/adapt/*/predictions.csv", "report"),
    File("metrics/pretrain/*.json", "report", _without("method"), signed=False),
    File("metrics/embed/*.json", "report register", _is("rankme", value="many"), signed=False),
    File(
        "metrics/cluster/*.json",
        "report register",
        _without("k") | _is("k", value=10**12) | _is("acc", value={"mean": float("nan"), "std": 0}),
        signed=False,
    ),
    File("metrics/linear/*.json", "report register", _is("all", value={"k": 1}), signed=False),
    File("metrics/adapt/*.json", "report", _is("errors", value=[1]), signed=False),
)
# A damaged lineage concerns all that comes after it.
LINEAGES = {
    "prepare": "pretrain embed cluster linear adapt report assign register",
    f"pretrain/{ENCODER}": "embed cluster linear adapt report assign register",
    f"embed/{ENCODER}": "cluster linear adapt report",
    f"cluster/{ENCODER}": "adapt report assign register",
    f"linear/{ENCODER}": "adapt report assign register",
    f"adapt/{ENCODER}": "report",
}
_LINEAGE: Mapping[str, Damage] = {
    **{name: damage for name, damage in ANY.items() if name not in ("missing", "one bit flipped")},
    **CONTENT["json"],
    "outputs null": with_value("outputs", value=None),
    "hashes that are numbers": with_value("outputs", value={"images.npy": 1}),
    "another input": with_value("inputs", value={"artifacts/prepare": "0" * 64}),
}
# What could as well be true where the hashes fit, so that no command can tell.
_MAY_BE_TRUE = re.compile(
    r"/(history|table|stream|predictions)\.csv is (one row less|the header alone)"
    r"|/heldout\.npy is (one row less|no rows)|/prototypes\.safetensors is one row less"
    r"|train/images\.npy is one row less.* × (pretrain|embed|adapt)"
    r"|test/images\.npy is one row less.* × (embed|register)"
)


def cases() -> Iterator[Case]:
    """All of them."""
    for file in FILES:
        path = Path(file.path.replace("*", ENCODER))
        content = {**CONTENT[path.suffix.lstrip(".")], **file.values}
        for command in file.readers.split():
            for name, damage in {**ANY, **content}.items():
                if file.signed or name != "one bit flipped":  # a digit of a metrics file: nothing can tell
                    yield _case(path, name, damage, command, signed=False)
            for name, damage in content.items() if file.signed else ():
                case = _case(path, name, damage, command, signed=True)
                if not _MAY_BE_TRUE.search(case.name):
                    yield case
    for folder, readers in LINEAGES.items():
        path = Path("artifacts", folder, "lineage.json")
        for command in readers.split():
            for name, damage in _LINEAGE.items():
                yield _case(path, name, damage, command, signed=False)


def _case(path: Path, name: str, damage: Damage, command: str, *, signed: bool) -> Case:
    def make() -> None:
        damage(path)
        if signed:
            sign()

    stage = path.parts[1]
    where = "|".join(map(re.escape, [path.name, path.stem, path.parent.as_posix(), stage, "dvc repro"]))
    assert stage in ("prepare", *STAGES)
    return Case(
        fault=f"file: {path.as_posix()} is {name}{', with hashes that fit' if signed else ''}",
        command=command,
        make=make,
        right=EITHER,
        says=where,
    )
