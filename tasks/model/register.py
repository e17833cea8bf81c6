"""Register encoders as models in MLflow, once per content and data, and move the alias `champion` to the best.

    python -m tasks.register [--encoder NAME]

A version has encoder, clusters and classifier, and tags for git commit, data hash, training run and the scores by which
the champion is chosen. Test labels play no part in that choice.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from deepclust import bundle, temporary
from deepclust.clustering import clusters
from deepclust.config import Number
from deepclust.errors import DataError
from deepclust.models import backbones
from tasks.shared.operations import params, provenance, store, tracking
from tasks.shared.operations.lock import locked
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout, lineage, prepared, read

ALIAS = "champion"
_SCORES = {"linear": "knn_heldout", "embed": "rankme"}  # by the stage that measures them
_CONTENT, _DATA = "content", "data.hash"
# What the stored model needs; timm only where the encoder is one of its networks.
_REQUIRED = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "torch", "torchvision")
_DEFINITION = "tasks/model/mlflow_model.py"
# The code that makes a prediction: stored with a version, and part of its content.
CODE = (
    "deepclust/bundle.py",
    "deepclust/clustering/assigners.py",
    "deepclust/clustering/clusters.py",
    "deepclust/distributed.py",
    "deepclust/files.py",
    "deepclust/images/depth.py",
    "deepclust/images/reading.py",
    "deepclust/models",
    "deepclust/seeding.py",
    _DEFINITION,
)
# What cannot change one: an edit of these makes no new version.
_STORED = (
    *CODE,
    "deepclust/__init__.py",
    "deepclust/clustering/__init__.py",
    "deepclust/clustering/kmeans.py",  # it and the next fit what `assigners` holds
    "deepclust/evaluation/probing.py",
    "deepclust/evaluation/__init__.py",
    "deepclust/config.py",
    "deepclust/errors.py",
    "deepclust/images/__init__.py",
)


def champion(versions: Iterable[Any], data: str) -> Any:
    """The best of MLflow's versions trained on this data: by held-out kNN, else RankMe; of equals, the newest.

    Numbers on different data are not comparable, so new data has a champion of its own.
    """

    def quality(version: Any) -> tuple[bool, float, int]:
        knn = version.tags.get("knn_heldout")
        return knn is not None, float(knn or version.tags.get("rankme") or 0), int(version.version)

    return max((version for version in versions if version.tags.get(_DATA) == data), key=quality)


def register(encoder: str, run_id: str | None = None) -> str:
    """Register an encoder with its clusters and classifier, unless this content is registered for this data already.

    Args:
        encoder: Name of the encoder.
        run_id: The run that the model belongs to if the one that trained it is not known.

    Returns:
        One line for the log.

    Raises:
        CheckpointError: If their artifacts do not belong together.
        DataError: If the stages before have not run.
        TrackingError: If the store can not be reached or refuses the model.
    """
    name = f"deepclust-{encoder}"
    files = _files(encoder)
    lineage.check([layout.META, *layout.predicting(encoder)])
    lineage.check_reported(layout.out(stage, encoder) for stage in _SCORES)
    data: str = prepared.meta()["content_hash"]
    content = _content(files, data)
    client, experiment = tracking.connect()
    with locked("registry"), store.errors():
        known = _versions(client, name)
        if content not in known:
            tags = {_CONTENT: content, _DATA: data, "encoder": encoder} | _scores(encoder)
            _create(client, experiment, name, encoder, files, tags, run_id)
            known = _versions(client, name)
        version = known[content]
        best = str(champion(known.values(), data).version)
        aliases = client.get_registered_model(name).aliases
        if str(aliases.get(ALIAS)) != best:
            client.set_registered_model_alias(name, ALIAS, best)
    place = ALIAS if str(version.version) == best else f"{ALIAS} stays version {best}"
    return f"{name} version {version.version} ({place})"


def _create(
    client: Any, experiment: str, name: str, encoder: str, files: list[Path], tags: dict[str, str], run_id: str | None
) -> None:
    trained = _training_run(client, experiment, encoder)
    origin = trained.data.tags if trained else provenance.git()
    run_id = trained.info.run_id if trained else run_id
    tags |= {key: origin[key] for key in ("git.commit", "git.dirty") if key in origin}
    tags |= {"run": run_id} if run_id else {}
    from tasks.model import mlflow_model  # imports MLflow, which takes seconds

    described = layout.statistics(encoder)
    classes = read.record(layout.out("linear", encoder) / "classifier.json", {"classes": list[str]})["classes"]
    with temporary.everything() as folder:  # MLflow's copies too
        for path in files:
            _copy(path, folder / "files" / (bundle.STATISTICS if path == described else path.name))
        for file in (file for source in _STORED for file in provenance.source_files(source)):
            _copy(provenance.ROOT / file, folder / ("model.py" if file == _DEFINITION else file))
        address = tracking.log_model(
            experiment,
            run_id,
            folder,
            requirements=_requirements(encoder),
            signature=mlflow_model.signature(labelled=bool(classes)),
            example=np.array(prepared.images("test", encoder)[:2]),
            metadata={"classes": classes, "encoder": encoder, "data_hash": tags[_DATA]},
        )
    tracking.create_version(client, name, address, run_id, tags)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _requirements(encoder: str) -> list[str]:
    backbone: str = read.record(layout.out("pretrain", encoder) / "encoder.json", {"backbone": str})["backbone"]
    packages = [*_REQUIRED, "timm"] if backbone.startswith(backbones.TIMM) else _REQUIRED
    return [f"{package}=={metadata.version(package).partition('+')[0]}" for package in packages]


def _files(encoder: str) -> list[Path]:
    """Everything that a prediction depends on."""
    files = layout.predicting(encoder)
    for path in files:
        if not path.exists() and path.name not in (bundle.WEIGHTS, clusters.ASSIGNERS):
            raise DataError(f"expected {path} to register {encoder}, found none; run `dvc repro` first")
    return [path for path in files if path.exists()]


def _content(files: Iterable[Path], data: str) -> str:
    """What tells versions apart: files, code and data, since the scores depend on test images that no file holds."""
    return hashlib.sha256(f"{data}:{provenance.file_hash(*files)}:{provenance.code_hash(*CODE)}".encode()).hexdigest()


def _scores(encoder: str) -> dict[str, str]:
    found = {
        name: read.record(layout.metrics(stage, encoder), {}, {name: Number}).get(name)
        for stage, name in _SCORES.items()
    }
    return {name: repr(float(value)) for name, value in found.items() if value is not None}


def _training_run(client: Any, experiment: str, encoder: str) -> Any:
    """The latest run that made this encoder, or None: an encoder from DVC's cache may be another machine's."""
    output = provenance.encoder_hash(encoder)
    wanted = f"tags.`{tracking.OUTPUT_TAG}` = '{output}' and tags.encoder = '{encoder}'"
    found = client.search_runs([experiment], wanted, max_results=1)
    return found[0] if found else None


def _versions(client: Any, name: str) -> dict[str, Any]:
    """Versions of a model by content."""
    return {found.tags.get(_CONTENT, ""): found for found in client.search_model_versions(f"name='{name}'")}


def main() -> None:
    """Register one encoder, or all of params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m tasks.register", description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", help="an encoder of params.yaml; all of its list without")
    name = parser.parse_args().encoder
    with errors_as_one_line():
        values = params.load()
        if name:
            values.method(name)
        if not store.enabled():
            say(f"tracking is off ({store.SWITCH}), nothing is registered")
            return
        for encoder in [name] if name else list(values.encoders):
            say(register(encoder))
