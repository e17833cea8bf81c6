"""A method's options as its constructor takes them: its section with every `auto` decided by the data."""

from __future__ import annotations

from typing import Any

from deepclust.errors import ConfigError
from deepclust.methods.parts import sizes
from tasks.shared.operations.params import pretrain as sections

OF_THE_RECIPE = {"method", "epochs", "batch_size", "accumulate", "optimiser", "crops", "colour"}
DEEPCLUSTER_HEADS = 3  # the published DeepCluster-v2 clusters three times (arXiv 2006.09882, appendix)


def options(section: sections.Trained, *, images: int, image_size: int) -> dict[str, Any]:
    """The options of a method.

    Args:
        section: The encoder's section.
        images: Training images.
        image_size: Side of an image in pixels.

    Raises:
        ConfigError: If the sizes do not fit the data or each other.
    """
    values = {name: value for name, value in section if name not in OF_THE_RECIPE}
    batch = section.batch_size
    part = batch // section.accumulate
    if isinstance(section, (sections.SwAV, sections.DeepClusterV2)):
        values["prototypes"] = _prototypes(section, images, image_size)
    if isinstance(section, sections.SwAV):
        pushed = max(0, section.epochs - section.queue_start_epoch) * (images // batch) * batch
        if section.queue_length == "auto":
            wanted = sizes.swav_queue(max(values["prototypes"]), batch, images, part=part)
            values["queue_length"] = wanted if wanted < pushed else 0
        _check_steps(section, values["queue_length"], pushed=pushed, updates=section.epochs * (images // batch))
    if isinstance(section, (sections.MoCo, sections.PCL)) and section.queue_length == "auto":
        values["queue_length"] = sizes.key_queue(images, batch)
    if isinstance(section, sections.PCL):
        if section.clusters == "auto":
            values["clusters"] = sizes.clusters(images, part)
        if section.negatives == "auto":
            values["negatives"] = sizes.negatives(values["clusters"], part)
        try:
            sections.check_negatives(values["clusters"], values["negatives"], part)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return values


def _check_steps(section: sections.SwAV, queue_length: int, *, pushed: int, updates: int) -> None:
    """Refuse what would never take effect: a queue that never fills, or first steps that are all there are."""
    if queue_length >= max(1, pushed):
        raise ConfigError(
            f"queue_length: from queue_start_epoch {section.queue_start_epoch} on, {pushed} embeddings enter a queue "
            f"of {queue_length}, so it would never be used; start it earlier, shorten it, or set queue_length to 0"
        )
    for name in ("freeze_prototypes_steps", "hard_assignment_steps"):
        steps = getattr(section, name)
        if steps >= max(1, updates):
            raise ConfigError(f"{name}: expected less than the {updates} updates of the run, got {steps}; lower it")


def automatic(section: sections.Trained, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the data decided."""
    return {name: values[name] for name, stated in section if name in values and stated == "auto"}


def _prototypes(section: sections.SwAV | sections.DeepClusterV2, images: int, image_size: int) -> tuple[int, ...]:
    if section.prototypes == "auto":
        heads = DEEPCLUSTER_HEADS if isinstance(section, sections.DeepClusterV2) else 1
        return (sizes.prototypes(images, image_size),) * heads
    return (section.prototypes,) if isinstance(section.prototypes, int) else section.prototypes
