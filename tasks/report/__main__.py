"""Compare the encoders of params.yaml: a table, pictures, and one HTML file that a browser opens offline.

python -m tasks.report
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deepclust.clustering import plane
from deepclust.errors import TrackingError
from tasks.model import register
from tasks.report import adaptation_plots as adaptation
from tasks.report import clusters as clustered
from tasks.report import comparison, costs, plots, prune, verdict
from tasks.shared.operations import costs as operations
from tasks.shared.operations import provenance, store
from tasks.shared.operations.params import schema
from tasks.shared.operations.text import safe, say, warn
from tasks.shared.outputs import layout, lineage, prepared, read, stage

_TEMPLATE = Path(__file__).with_name("report.html")
_MAP_PERPLEXITY = 30.0
_FILES_SHOWN = 200
_NEITHER_GOOD_NOR_BAD = ("k", "dim", "image_size", "megabytes")
_WHERE: dict[str, read.Check] = {"classifier": str, "setting": str, "batch_size": int, "adapter": str, "guarded": int}
_SHIFT: dict[str, read.Check] = {"shift": str, "severity": int, "images": int, "error": read.number}
# The tables of `adapt`, and what checks their cells.
ADAPT: dict[str, dict[str, read.Check]] = {
    "table.csv": _WHERE | _SHIFT | dict.fromkeys(adaptation.INDICATORS, read.number),
    "stream.csv": _WHERE | _SHIFT | {"agreement": read.number},
    "predictions.csv": _WHERE | {"prediction": str},
}


def main() -> None:
    """Run the stage."""
    with stage.running("report") as here:
        encoders = list(here.params.encoders)
        if left := prune.unlisted(encoders):
            say(f"{len(left)} results are of encoders that are not listed: python -m tasks.report.prune shows them")
        lineage.check_reported(lineage.inputs("report", *encoders))
        rows = comparison.collect(encoders)
        stage.write_text(here.folder / layout.COMPARISON.name, stage.table(rows, list(rows[0])))
        pictures = draw(here.folder, rows, here.params)
        stage.write_text(here.folder / layout.REPORT.name, render(here.folder, pictures, rows, here.params))
        costly = comparison.with_costs(rows)
        numbers = {
            f"{row['encoder']}/{name}": value
            for row in costly
            for name, value in row.items()
            if isinstance(value, float)
        }
        for run in (here.run, here.run.pipeline):
            run.log_metrics(numbers)
        here.run.log_artifact(here.folder / layout.REPORT.name)
        here.run.log_artifact(here.folder / layout.COMPARISON.name)
        if store.enabled():
            register_all([str(row["encoder"]) for row in rows], here.run.run_id)
        say("", *comparison.comparison_text(costly).split("\n"), "", *verdict.best(rows))
        say("", "On the test set:", *verdict.on_test(rows))
    stage.write_if_possible(layout.COSTS, costs.script(costly))  # beside the outputs, when they are in their place


def register_all(encoders: Iterable[str], run_id: str) -> None:
    """Register models. A tracking server that is lost is a warning, since the report is finished and worth keeping."""
    try:
        for encoder in encoders:
            say(f"registered {register.register(encoder, run_id)}")
    except TrackingError as error:
        warn(f"not all models are registered, `python -m tasks.register` does it ({error})")


def draw(folder: Path, rows: list[comparison.Row], values: schema.Params) -> dict[str, Any]:
    """Write every picture into the folder.

    Returns:
        `training`, `scores`, `evaluation`: a file name or None; `maps`: encoder to file name; `clusters`: encoder to
        what `clusters.collect` says; `adaptation`: encoder to what `adapted` says.
    """
    encoders = [str(row["encoder"]) for row in rows]
    pictures: dict[str, Any] = {"scores": "scores.png", "maps": {}, "clusters": {}, "adaptation": {}}
    curves = {encoder: found for encoder in encoders if (found := history(encoder))}
    pictures["training"] = "training.png" if curves else None
    if curves:
        plots.save(plots.training(curves), folder / "training.png")
    names = [name for name in comparison.columns(rows) if name in ("acc", "nmi", "linear", "rankme")]
    names += [name for name in comparison.columns(rows) if name.startswith("knn")]
    scores: dict[str, list[Any]] = {comparison.title(name): [row[name] for row in rows] for name in names}
    baselines = sum(row["method"] in comparison.BASELINES for row in rows)
    plots.save(plots.scores(encoders, scores, baselines), folder / "scores.png")
    panels = evaluation_curves(encoders)
    pictures["evaluation"] = "evaluation.png" if panels else None
    if panels:
        plots.save(plots.evaluation(panels, encoders, baselines), folder / "evaluation.png")
    labels, classes = prepared.labels("test"), prepared.meta()["classes"]
    # The images on the map, the same for every encoder.
    chosen = np.sort(np.random.default_rng(values.seed).permutation(len(labels))[: values.report.map_images])
    for encoder, row in zip(encoders, rows, strict=True):
        embedded = torch.from_numpy(prepared.embeddings(encoder)["test"][chosen])
        points, k = plane.flatten(embedded, perplexity=_MAP_PERPLEXITY), int(str(row["k"]))
        clusters = assignments(encoder, k=k, images=len(labels))[chosen]
        figure = plots.embedding_map(points, labels[chosen], classes, clusters, k)
        pictures["maps"][encoder] = f"map-{encoder}.png"
        plots.save(figure, folder / f"map-{encoder}.png")
        pictures["clusters"][encoder] = clustered.collect(encoder, folder, picture)
        pictures["adaptation"][encoder] = adapted(folder, encoder, values)
        say(f"{encoder}: pictures drawn")
    return pictures


def adapted(folder: Path, encoder: str, values: schema.Params) -> dict[str, Any]:
    """What the report says of an encoder's adaptation; its curves are drawn into the folder."""
    made = layout.out("adapt", encoder)
    groups = adaptation.groups(read.table(made / "table.csv", ADAPT["table.csv"]), values.adapt.corruptions)
    stream = read.table(made / "stream.csv", ADAPT["stream.csv"])
    curves = {}
    for index, group in enumerate(adaptation.drawn(groups)):
        if curve := adaptation.curve(group, stream):
            curves[group.title] = f"stream-{encoder}-{index}.png"
            plots.save(plots.stream(curve), folder / curves[group.title])
    # The first group's classifier and batch size have their curves in view, the others theirs folded away.
    first = [
        group.title
        for group in groups
        if (group.classifier, group.batch_size) == (groups[0].classifier, groups[0].batch_size)
    ]
    names, means = adaptation.mean_table(groups)
    predicted = any(read.rows(made / "predictions.csv", ADAPT["predictions.csv"]))  # which may be long
    metrics, linear = comparison.stage_metrics("adapt", encoder), comparison.stage_metrics("linear", encoder)
    absent = [f"{name}: {reason}" for name, reason in (metrics.get("not_applicable") or {}).items()]
    absent += [f"{name}: {of['reason']}" for name, of in (("linear", linear), ("adapt", metrics)) if of.get("reason")]
    return {
        "groups": [
            {
                "title": group.title,
                "heat": adaptation.heat_map(group),
                "indicators": adaptation.indicators(group),
                "curve": None if group.title in first else curves.get(group.title),
            }
            for group in groups
        ],
        "adapters": names,
        "means": means,
        "curves": {title: curves[title] for title in first if title in curves},
        "images": metrics.get("images", 0),
        "guard": adaptation.guard_sentence(metrics.get("guard") or {}),
        "predictions": (made / "predictions.csv").as_posix() if predicted else None,
        "absent": absent,
    }


def history(encoder: str) -> dict[str, list[tuple[int, float]]]:
    """What an encoder logged in training: name to steps and values; empty for a baseline."""
    path = layout.out("pretrain", encoder) / "history.csv"
    rows = read.table(path, {"step": int, "epoch": int}, others=read.number)
    names = [name for name in rows[0] if name not in ("step", "epoch")] if rows else []
    curves = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}
    return {name: points for name, points in curves.items() if points}


def evaluation_curves(encoders: Iterable[str]) -> list[plots.Panel]:
    """ACC and NMI over the numbers of clusters in the tree, where there are labels; kNN over the neighbours."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float, float]]]] = {}
    for encoder in encoders:
        clusters = comparison.stage_metrics("cluster", encoder)
        every = {int(k): scores for k, scores in [(clusters["k"], clusters), *clusters.get("other_k", {}).items()]}
        for name in ("acc", "nmi") if "acc" in clusters else ():
            points = [(k, s[name]["mean"], s[name]["std"]) for k, s in sorted(every.items()) if s.get(name)]
            found.setdefault((comparison.title(name), "clusters k"), {})[encoder] = points
    for encoder in encoders:
        accuracies = comparison.stage_metrics("linear", encoder).get("all") or {}
        named = [(name[1:].partition("_t"), value) for name, value in accuracies.items()]
        for (neighbours, _, temperature), value in sorted(((int(k), t, tau), v) for (k, t, tau), v in named):
            panel = found.setdefault((f"kNN, τ = {temperature}", "neighbours k"), {})
            panel.setdefault(encoder, []).append((neighbours, value, 0.0))
    return [plots.Panel(title, label, lines) for (title, label), lines in found.items() if any(lines.values())]


def assignments(encoder: str, *, k: int, images: int) -> NDArray[np.int64]:
    """Cluster of each test image, -1 of none, in data-set order. Raises: DataError if they are missing or damaged."""
    path = layout.out("cluster", encoder) / "assignments.csv"
    rows = [row for row in read.table(path, {"split": str, "index": int, "cluster": int}) if row["split"] == "test"]
    if [int(row["index"]) for row in rows] != list(range(images)):
        raise read.damaged(path, f"expected a numbered row for each of {images} test images in {path}, got {len(rows)}")
    clusters = np.array([int(row["cluster"]) for row in rows])
    if not (clusters.min() >= -1 and clusters.max() < k):
        raise read.damaged(path, f"expected clusters from -1 to {k - 1} in {path}, got others")
    return clusters


def picture(path: Path) -> Path:
    """The path of a PNG that is whole. Raises: DataError."""
    try:
        with Image.open(read.there(path), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise read.damaged(path, f"expected a picture in {path}, got a damaged file") from error
    return path


def render(folder: Path, pictures: dict[str, Any], rows: list[comparison.Row], values: schema.Params) -> str:
    """The HTML, with the folder's pictures inside."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: safe(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["inline"] = lambda name: (
        "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
    )
    # The report may be sent to others: it names the folders of images and does not tell where they are.
    folders = {"data.folder": values.data.folder, "adapt.domains": values.adapt.domains}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        meta=prepared.meta(),
        files_shown=_FILES_SHOWN,
        rows=rows,
        comparison=comparison,
        verdict=verdict,
        cost=cost,
        adaptation=adaptation,
        best=best(rows),
        pictures=pictures,
        values=values,
        params=provenance.all_params(values) | {name: Path(path).name or path for name, path in folders.items()},
    )


def cost(column: str, encoder: str) -> str | None:
    """Hash of the outputs that a column of costs is of, by which costs.js knows the cell; None for other columns."""
    return operations.identity(costs.STAGE[column], encoder) if column in costs.STAGE else None


def best(rows: list[comparison.Row]) -> dict[str, float]:
    """The best value of each column; of errors, the smallest."""
    found = {}
    for name in comparison.columns(rows):
        numbers = [float(value) for row in rows if isinstance(value := row[name], (int, float))]
        if name not in _NEITHER_GOOD_NOR_BAD and len(numbers) > 1:
            found[name] = min(numbers) if comparison.small_is_good(name) else max(numbers)
    return found


if __name__ == "__main__":
    main()
