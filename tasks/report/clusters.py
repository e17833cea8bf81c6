"""What the report says of an encoder's clusters: algorithms, how many, how sure, and what else is in the data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.report import comparison, plots
from tasks.shared.outputs import layout, read

_SCORES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "information": "information", "stability": "stability"}
_SHEETS = ("gallery", "tree", "duplicates", "unusual")
_TRIED: dict[str, read.Check] = {"k": int, "silhouette": read.number, "stability": read.number, "score": read.number}


def collect(encoder: str, folder: Path, picture: Callable[[Path], Path]) -> dict[str, Any]:
    """All of it; the pictures are put into the folder.

    Args:
        encoder: Name of the encoder.
        folder: Where pictures go.
        picture: Gives back the path of a whole PNG, or raises.
    """
    made, metrics = layout.out("cluster", encoder), comparison.stage_metrics("cluster", encoder)
    found: dict[str, Any] = {"k": metrics["k"], "algorithm": metrics["algorithm"], "sheets": {}, "curve": None}
    for name in _SHEETS:
        if (made / f"{name}.png").exists():
            found["sheets"][name] = f"{name}-{encoder}.png"
            shutil.copyfile(picture(made / f"{name}.png"), folder / found["sheets"][name])
    tried = made / "how_many.csv"
    if tried.exists():
        rows = [{name: float(value) for name, value in row.items()} for row in read.table(tried, _TRIED)]
        found["curve"] = f"how-many-{encoder}.png"
        plots.save(plots.how_many(rows, metrics["k"]), folder / found["curve"])
    names = [name for name in _SCORES if any(name in scores for scores in metrics["algorithms"].values())]
    found["columns"] = [_SCORES[name] for name in names]
    found["rows"] = {
        algorithm: [_told(scores.get(name)) for name in names] for algorithm, scores in metrics["algorithms"].items()
    }
    found["estimate"] = estimate(metrics.get("estimate"))
    found["coverage"] = [
        (f"{float(share):.0%}", comparison.fraction(acc)) for share, acc in (metrics.get("coverage") or {}).items()
    ]
    found["rejected"] = metrics["rejected"]
    found["inspection"] = inspection(metrics["inspection"])
    found["leak"] = metrics["inspection"]["copies"]["between"]["images"]
    return found


def estimate(values: Mapping[str, Any] | None) -> str:
    """How many clusters were estimated, and how sure that is, as a sentence; empty where k was stated."""
    if not values:
        return ""
    if values["reason"]:
        return f"One cluster: {values['reason']}."
    low, high = values["interval"]
    told = (
        f"Estimated without labels: {values['k']} clusters. {values['sure']:.0%} of the subsamples say so within 15 %"
    )
    told += f", all say {low} to {high}." if low < high else "."
    if values["runners_up"]:
        told += f" Next best: {', '.join(map(str, values['runners_up']))}."
    if values["edge"]:
        word = "fewest" if values["edge"] == "least" else "most"
        told += f" This is the {word} that was considered: there may be {'fewer' if word == 'fewest' else 'more'}."
    return told


def inspection(values: Mapping[str, Any]) -> list[str]:
    """What was found in the images, a sentence each."""
    copies, sentences = values["copies"], []
    for name, where in (("train", "the training images"), ("test", "the test images")):
        if copies[name]["groups"]:
            groups, images = copies[name]["groups"], copies[name]["images"]
            sentences.append(f"{_count(groups, 'group')} of copies among {where}, {_count(images, 'image')}.")
    unusual = {
        kind: values["train"].get(kind, 0) + values["test"].get(kind, 0)
        for kind in dict.fromkeys([*values["train"], *values["test"]])
    }
    listed = [
        _count(number, f"{kind} image" if kind != "outlier" else kind) for kind, number in unusual.items() if number
    ]
    if listed:
        sentences.append(f"{', '.join(listed)}.")
    return sentences or ["No copies, and no image stands out."]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _told(spread: Mapping[str, float] | None) -> str:
    return f"{comparison.fraction(spread['mean'])} ± {comparison.fraction(spread['std'])}" if spread else ""
