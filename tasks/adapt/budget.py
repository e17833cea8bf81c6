"""How many test images an encoder is measured on, so that the stage stays within `adapt.budget`.

The minutes are an estimate, from `cost` and the adapters' `passes`, and not a measurement: what is chosen follows from
the parameters, the encoder and the numbers of images alone, on every machine. Making the corruptions is left out: at
160 pixels one takes 6 ms an image on average, and what EfficientNet-Lite0 then does with the image 50 times as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deepclust.adaptation import ADAPTERS
from deepclust.adaptation.adapters import bn
from deepclust.adaptation.base import BACKWARD, BATCH_STATISTICS, AdapterConfig
from deepclust.models.cost import Cost
from tasks.shared.operations.params import schema

SIZES = (384, 256, 128)
"""What `adapt.images: auto` chooses from; the last is a batch of the default size, and fewer say little."""
SOURCE_IMAGES = 1024  # training images, without their labels, for statistics and confidence without a shift
_ALIGN = 2.5  # forward passes that aligning BatchNorm takes


class Plan(NamedTuple):
    """What the stage does for an encoder.

    Attributes:
        images: Most test images of a shift.
        minutes: What it is estimated to take, on one core of the machine in `deepclust.models.cost`.
        reason: Why nothing is measured; empty otherwise.
    """

    images: int
    minutes: float
    reason: str = ""


class Data(NamedTuple):
    """How many images there are.

    Attributes:
        test: Test images that can be chosen.
        train: Training images.
        labelled: Those of them with a label.
        domains: Files of each domain.
    """

    test: int
    train: int
    labelled: int
    domains: Sequence[int]


def plan(encoder: str, cost: Cost, data: Data, values: schema.Adapt) -> Plan:
    """What to do for an encoder.

    Args:
        encoder: Its name.
        cost: Of one of its images.
        data: How many images there are.
        values: Parameters of the stage.
    """
    named = values.encoders != "auto"
    sizes = SIZES if values.images == "auto" else (values.images,)
    if named and encoder not in values.encoders:
        return Plan(0, 0.0, "adapt.encoders does not name it")
    found = [Plan(size, minutes(size, cost, data, values)) for size in sizes]
    fitting = [each for each in found if values.budget is None or each.minutes <= values.budget]
    if fitting:
        return fitting[0]
    least = found[-1]
    if named:
        return least
    return least._replace(
        reason=f"{least.images} test images of each shift would take about {least.minutes:.1f} minutes of one core, "
        f"and adapt.budget is {values.budget:g}; raise it, take fewer adapt.corruptions, or name {encoder} in "
        "adapt.encoders"
    )


def domain_sizes(folder: Path) -> list[int]:
    """How many files each domain has, those included that turn out to be no images."""
    return [sum(path.is_file() for path in domain.rglob("*")) for domain in sorted(folder.glob("*/"))]


def minutes(images: int, cost: Cost, data: Data, values: schema.Adapt) -> float:
    """What measuring on so many images of each shift is estimated to take."""
    kinds = [kind for kind in values.classifiers if kind == "clusters" or data.labelled]
    clean = min(images, data.test)
    shifts = [clean] * (1 + len(values.corruptions) * len(values.severities))
    shifts += [min(images, count) for count in data.domains]
    options = {name: values.adapter(name) for name in values.adapters}
    seconds = 0.0
    for batch_size in values.batch_sizes:
        each = cost.seconds(batch_size)
        for setting in values.settings:
            streams = shifts if setting in ("reset", "correlated") else [sum(shifts)]
            seconds += sum(each * _passes(count, batch_size, options, guard=values.guard) for count in streams)
    source = min(SOURCE_IMAGES, data.train) * cost.seconds(SOURCE_IMAGES)
    seconds += source * (1 + (_ALIGN if values.align else 0))
    seconds *= len(kinds)
    if "fine_tuned" in kinds:
        tuning = values.fine_tune()
        seconds += tuning.epochs * data.labelled * (BATCH_STATISTICS + BACKWARD) * cost.seconds(tuning.batch_size)
    return seconds / 60


def _passes(count: int, batch_size: int, options: Mapping[str, AdapterConfig], *, guard: bool) -> float:
    """Forward passes that all adapters need along a stream of images; see `measuring` for what they share.

    A guarded adapter is counted after the first batch alone, until which it always shares what the unguarded one does.
    """
    alone = max(0, count - batch_size) if guard else 0
    total = count * (1 + BATCH_STATISTICS)  # the source model and bn, with which guards compare
    for name, config in options.items():
        plain = isinstance(config, bn.Config) and not config.prior
        if not ADAPTERS[name].frozen and not plain:
            total += config.passes * (count + alone)
    return total
