"""Earlier parameter files brought to the keys of today."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap

from deepclust.config import as_dict
from deepclust.errors import ConfigError
from tasks.shared.operations.params import overrides

# Keys that are new, with the value that comes nearest to what was done before.
_NEW: dict[str, Any] = {
    "data.images": "all",
    "data.white": "file",
    "data.background": "black",
    "data.pages": "first",
    "data.bands": [],
    "data.follow_links": False,
    "adapt.encoders": "auto",
    "adapt.budget": None,
    "pretrain.pcl.kmeans_engine": "faiss",
    "pretrain.deepcluster_v2.kmeans_engine": "faiss",
}


def migrate(path: Path) -> tuple[list[str], str]:
    """Rewrite a parameter file or a recipe in place, whole or not at all.

    Returns:
        One line for each key that has moved or is new, and the change as a unified diff.

    Raises:
        ConfigError: If the file is missing, is no YAML, or is invalid for another reason.
    """
    lines: list[str] = []

    def change(document: Any) -> None:
        # A recipe states some sections only, and gets no keys that it did not have.
        whole = "seed" in document and "data" in document
        _check(document)
        for step in _STEPS:
            lines.extend(step(document, whole))

    difference = overrides.rewrite(path, change)
    return lines, difference


def _check(document: Any) -> None:
    """Refuse a file whose outer sections, in which the steps look for keys, are none."""
    sections = {name: document[name] for name in ("data", "pretrain", "cluster", "adapt") if name in document}
    if isinstance(pretrain := sections.get("pretrain"), CommentedMap) and "shared" in pretrain:
        sections["pretrain.shared"] = pretrain["shared"]
    for name, section in sections.items():
        if not isinstance(section, CommentedMap):
            raise ConfigError(f"{name}: expected a mapping, got {section!r}")


def _encoders(document: Any, whole: bool) -> Iterator[str]:
    if isinstance(document.get("encoders"), list):
        stated = {name for name in document["encoders"] if "method" in (document.get("pretrain", {}).get(name) or {})}
        overrides.name_methods(document, None)
        yield "encoders: now a mapping of each encoder to its method"
        for name in sorted(stated):
            yield f"pretrain.{name}.method: now encoders.{name}"


def _image_size(document: Any, whole: bool) -> Iterator[str]:
    """The one size of all images is now that of the networks that are trained here; encoders of pixels keep theirs."""
    size = "auto"
    if "image_size" in document.get("data", ()):
        size = document["data"].pop("image_size")
        shared = document.setdefault("pretrain", CommentedMap()).setdefault("shared", CommentedMap())
        shared.insert(min(1, len(shared)), "image_size", size)
        yield f"data.image_size: now pretrain.shared.image_size, {size}; pixels and pretrained weights have their own"
    if not whole:
        return
    sections, methods = document.get("pretrain", {}), document.get("encoders")
    if "shared" in sections:
        yield from _add(sections["shared"], "pretrain.shared", "image_size", "auto")
    named = [name for name, method in methods.items() if method == "pixels"] if isinstance(methods, dict) else []
    for name in dict.fromkeys(["pixels", *named]):
        if isinstance(section := sections.get(name), CommentedMap):
            yield from _add(section, f"pretrain.{name}", "image_size", 64 if size == "auto" else size)


def _add(section: CommentedMap, path: str, key: str, value: Any) -> Iterator[str]:
    if key not in section:
        section.insert(max(0, len(section) - 1), key, value)  # the empty line below belongs to the last key
        yield f"{path}.{key}: new, {value}"


def _sizes_of_pretrained(document: Any, whole: bool) -> Iterator[str]:
    for name, section in (document.get("pretrain") or {}).items():
        if not isinstance(section, CommentedMap) or "input_size" not in section:
            continue
        place, comment = list(section).index("input_size"), section.ca.items.get("input_size")
        old = section.pop("input_size")
        section.insert(place, "image_size", "auto" if old is None else old)
        if comment:
            section.ca.items["image_size"] = comment
        became = "auto, what the weights were made for" if old is None else old
        yield f"pretrain.{name}.input_size: now image_size, {became}"


def _new_keys(document: Any, whole: bool) -> Iterator[str]:
    for dotted, value in _NEW.items() if whole else ():
        *parents, last = dotted.split(".")
        section = document
        for part in parents:
            section = section.get(part) if isinstance(section, CommentedMap) else None
        if isinstance(section, CommentedMap) and last not in section:
            section.insert(max(0, len(section) - 1), last, value)  # the empty line below belongs to the last key
            yield f"{dotted}: new, {'null' if value is None else value}"
    if whole:
        methods = document.get("encoders")
        for name, method in methods.items() if isinstance(methods, dict) else ():
            section = document.get("pretrain", {}).get(name)
            template = f"pretrain.{method}.kmeans_engine"
            if template in _NEW and isinstance(section, dict) and "kmeans_engine" not in section:
                section["kmeans_engine"] = _NEW[template]
                yield f"pretrain.{name}.kmeans_engine: new, {_NEW[template]}"


# What was done before there were other algorithms; the new keys of `cluster` come before `normalise`.
_CLUSTER: dict[str, Any] = {"algorithms": ["kmeans"], "primary": "auto", "reject": 0.0, "duplicates": "keep"}
_KMEANS = {"iterations": None, "restarts": 1, "engine": "faiss"}


def _clustering(document: Any, whole: bool) -> Iterator[str]:
    """k-means is one algorithm of several, with a section; the rule for k without labels is an estimate."""
    cluster = document.get("cluster")
    if not isinstance(cluster, CommentedMap):
        return
    moved = {key: cluster.pop(key) for key in _KMEANS if key in cluster}
    if moved:
        if "kmeans" not in cluster:
            cluster.insert(max(0, len(cluster) - 1), "kmeans", CommentedMap())
        section = cluster["kmeans"]
        for key, value in moved.items():
            section[key] = value
            yield f"cluster.{key}: now cluster.kmeans.{key}"
    earlier = bool(moved) or (whole and "algorithms" not in cluster)
    if earlier and cluster.get("k") == "auto":
        cluster["k"] = "classes"
        yield (
            "cluster.k: now classes, the number of classes; where there are none it is estimated, and no longer "
            "sqrt(images / 2); auto estimates it in any case"
        )
    if earlier and cluster.get("other_k"):
        yield "cluster.other_k: no longer fits of their own, but cuts of one tree of clusters"
    if whole:
        for key, value in _CLUSTER.items():
            yield from _add(cluster, "cluster", key, value)
        yield from _algorithms(cluster)


def _algorithms(cluster: CommentedMap) -> Iterator[str]:
    """The sections of the estimate and of every algorithm state every option."""
    from deepclust.clustering import algorithms, how_many

    kinds = {"how_many": how_many.Config} | {name: algorithms.config_class(name) for name in algorithms.ALGORITHMS}
    for name, kind in kinds.items():
        if name not in cluster:
            cluster.insert(max(0, len(cluster) - 1), name, CommentedMap())  # as in `_add`
        section = cluster[name]
        if not isinstance(section, CommentedMap):
            continue
        missing = {key: value for key, value in as_dict(kind()).items() if key not in section}
        if name == "kmeans":
            missing |= {key: value for key, value in _KMEANS.items() if key in missing and value is not None}
        section.update(missing)
        if missing:
            yield f"cluster.{name}: new, {', '.join(f'{key} {value}' for key, value in missing.items())}"


_STEPS: tuple[Callable[[Any, bool], Iterator[str]], ...] = (
    _encoders,
    _image_size,
    _sizes_of_pretrained,
    _clustering,
    _new_keys,
)
