"""What the names of folders say of sides and classes; from the paths of images alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from deepclust.images.labels import UNLABELLED

_TRAIN = ("train", "training", "trn")
_TEST = ("test", "testing", "tst", "val", "valid", "validation", "eval", "dev")  # of several the first is taken
_FILLERS = ("dataset", "data", "set", "images", "image", "imgs", "img", "split", "part")
_PARTS = re.compile(r"(part|fold|batch|split|chunk|shard|subset|partition)s?[\W_]*\d+", re.IGNORECASE)
_SHOWN = 5

Side = dict[str, str]  # path: the same within its side, where its first folder is its class


class _Name(NamedTuple):
    """A folder's name: its words for a side, and its other ones."""

    sides: tuple[str, ...]
    others: tuple[str, ...]


def wrappings(images: Collection[str]) -> list[str]:
    """The root, which is an empty string, and each folder that all images lie in: `flowers/`, `flowers/images/`."""
    found = [""]
    while len(heads := {image.removeprefix(found[-1]).partition("/")[:2] for image in images}) == 1:
        head, slash = heads.pop()
        if not slash:
            break
        found.append(f"{found[-1]}{head}/")
    return found


def sides(images: list[str], warnings: list[str]) -> dict[str, Side]:
    """The images of `train` and, if there is such a folder, `test`, without the folders that only wrap classes."""
    found = {"train": {image: image for image in images}}
    while not (pair := _pair(found["train"].values())):
        wrapping = _wrapping(found["train"])
        if not wrapping:
            return found
        _strip(found["train"], wrapping)
    train, test = pair
    inner, found = found["train"], {"train": {}, "test": {}}
    unused: set[str] = set()
    for image, path in inner.items():
        head, slash, rest = path.partition("/")
        if slash and head in pair:
            found["train" if head == train else "test"][image] = rest
        elif slash and head.lower() in UNLABELLED:
            found["train"][image] = path
        else:
            unused.add(head)
    if unused:
        warnings.append(
            f"not used beside {train}/ and {test}/: {_some(sorted(unused))}; move what is to be used into one of "
            f"them, or into {UNLABELLED[0]}/"
        )
    _unwrap(found)
    return found


def classes(paths: Collection[str], warnings: list[str]) -> list[str | None]:
    """The class of each path of a side, which is its first folder."""
    heads = {head for head in _heads(paths) if head.lower() not in UNLABELLED}
    loose = sum("/" not in path for path in paths)
    if heads and loose:
        warnings.append(
            f"taken as unlabelled: {loose} images lie beside {len(heads)} folders; "
            f"move them into {UNLABELLED[0]}/ if the folders are classes"
        )
        heads = set()
    return [head if (head := path.split("/", 1)[0]) in heads else None for path in paths]


def doubts(paths: Collection[str]) -> list[str]:
    """Warnings where the first folders of paths, which are taken as classes, look like something else."""
    inside: dict[str, set[str]] = {}
    for path in paths:
        head, *rest = path.split("/")
        if rest and head.lower() not in UNLABELLED:
            inside.setdefault(head, set()).add(rest[0] if len(rest) > 1 else "")
    if len(inside) < 2:
        return []
    shown = _some(sorted(inside))
    remedy = "if they are not classes, move the class folders out of them, or list the labels in labels.csv"
    names = [_name(head) for head in inside]
    paired = {name.others for name in names if name.sides and name.sides[0] in _TRAIN}
    if all(_PARTS.fullmatch(head) for head in inside) or (
        all(name.sides for name in names) and any(name.others in paired for name in names if name.sides[0] in _TEST)
    ):
        return [f"the {len(inside)} classes look like parts of a data set: {shown}; {remedy}"]
    below = set().union(*inside.values())
    if "" not in below and all(_name(each).sides for each in below):
        return [
            f"all {len(inside)} classes ({shown}) have sub-folders that look like splits: {_some(sorted(below))}; move "
            "them above the class folders"
        ]
    if "" not in below and len(below) > 1 and all(each == below for each in inside.values()):
        return [
            f"all {len(inside)} classes ({shown}) have the same sub-folders, which might be the classes: "
            f"{_some(sorted(below))}; {remedy}"
        ]
    return []


def _heads(paths: Iterable[str]) -> set[str]:
    """First folders of paths that lie in one."""
    return {path.split("/", 1)[0] for path in paths if "/" in path}


def _name(folder: str) -> _Name:
    """`seg_train`, `trainingSet` and `train2017` have one word for a side each; digits and fillers say nothing."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", folder)
    words = re.findall(r"[^\W\d_]+", spaced.casefold())
    found, others = [], []
    for word in words:
        short = next((word.removesuffix(filler) for filler in _FILLERS if word.endswith(filler)), word)
        if (side := short if short in _TRAIN + _TEST else word) in _TRAIN + _TEST:
            found.append(side)
        elif word not in _FILLERS:
            others.append(word)
    return _Name(tuple(found), tuple(others))


def _pair(paths: Collection[str]) -> tuple[str, str] | None:
    """The folders of training and test images, whose names differ only in the words that say so.

    Of several test folders the first with class folders counts, since a published test set may come without labels.
    """
    with_folders = {path.split("/", 1)[0] for path in paths if path.count("/") > 1}
    names = {folder: name for folder in _heads(paths) if len((name := _name(folder)).sides) == 1}
    pairs = [
        (test not in with_folders, _TEST.index(second.sides[0]), _TRAIN.index(first.sides[0]), train, test)
        for train, first in names.items()
        for test, second in names.items()
        if first.sides[0] in _TRAIN and second.sides[0] in _TEST and first.others == second.others
    ]
    if len({names[train].others for *_, train, _ in pairs}) != 1:  # none, or trainA and testA beside trainB and testB
        return None
    *_, train, test = min(pairs)
    return train, test


def _wrapping(side: Side) -> str | None:
    """The one folder that all images, or all but the unlabelled ones, lie in, if it has folders."""
    labelled = [path for path in side.values() if path.split("/", 1)[0].lower() not in UNLABELLED or "/" not in path]
    heads = {path.partition("/")[:2] for path in labelled}
    if len(heads) != 1:
        return None
    head, slash = heads.pop()
    return head if slash and any(path.count("/") > 1 for path in labelled) else None


def _strip(side: Side, wrapping: str) -> None:
    for image, path in side.items():
        side[image] = path.removeprefix(f"{wrapping}/")


def _unwrap(both: dict[str, Side]) -> None:
    """Take away folders that hold all of a side, unless its name is a class of the other side."""
    while True:
        wraps = {name: _wrapping(side) for name, side in both.items()}
        heads = {name: _heads(side.values()) for name, side in both.items()}
        if not all(wraps.values()):
            others = {"train": heads["test"], "test": heads["train"]}
            wraps = {name: wrap if wrap not in others[name] else None for name, wrap in wraps.items()}
        if not any(wraps.values()):
            return
        for name, wrap in wraps.items():
            if wrap:
                _strip(both[name], wrap)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
