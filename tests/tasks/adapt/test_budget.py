"""On how many images an encoder is measured, against sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepclust.adaptation import ADAPTERS
from deepclust.models import backbones, cost
from tasks.adapt import budget
from tasks.shared.operations import params
from tests.paths import ROOT

SECOND = cost.Cost(round(1 / cost.MACS), 0, 0)  # of an image, in whatever batch
FASHION_MNIST = budget.Data(test=10_000, train=60_000, labelled=60_000, domains=[])


def values(**changes: Any) -> Any:
    return params.load(ROOT / "params.yaml").adapt.replaced(**changes)


def of(name: str, size: int, channels: int = 3) -> cost.Cost:
    return cost.of(backbones.build(name, channels=channels, image_size=size)[0], (channels, size, size))


def plain(**changes: Any) -> Any:
    return values(**{"adapters": ("source",), "guard": False, "align": False, "corruptions": ("fog",), **changes})


def test_minutes_are_forward_passes_by_hand() -> None:
    data = budget.Data(test=50, train=30, labelled=30, domains=[7, 99])
    images = 50 + 50 + 7 + 60  # clean, fog and the domains, of which at most 60 images are taken
    passes = 1 + 1.25

    def seconds(options: Any) -> float:
        return budget.minutes(60, SECOND, data, options) * 60

    assert seconds(plain(settings=("reset",))) == pytest.approx(images * passes + 30)
    assert seconds(plain(settings=("reset", "mixed"))) == pytest.approx(2 * images * passes + 30)
    assert seconds(plain(settings=("reset",), severities=(3, 5))) == pytest.approx((images + 50) * passes + 30)
    assert seconds(plain(settings=("reset",), batch_sizes=(16, 128))) == pytest.approx(2 * images * passes + 30)
    assert seconds(plain(settings=("reset",), align=True)) == pytest.approx(images * passes + 3.5 * 30)
    two = plain(settings=("reset",), classifiers=("linear", "clusters"))
    assert seconds(two) == pytest.approx(2 * (images * passes + 30))
    free = {"settings": ("reset",), "adapters": ("bn", "t3a", "lame", "tent")}
    assert seconds(plain(**free)) == pytest.approx(images * (passes + 3.25) + 30), "what is shared costs nothing"
    # Guarded, tent computes for itself after the first 20 images of a stream; in a long one that is once.
    alone = 30 + 30 + 0 + 40
    guarded = plain(**free, guard=True, batch_sizes=(20,))
    assert seconds(guarded) == pytest.approx(images * passes + 3.25 * (images + alone) + 30)
    mixed = plain(**free | {"settings": ("mixed",)}, guard=True, batch_sizes=(20,))
    assert seconds(mixed) == pytest.approx(images * passes + 3.25 * (2 * images - 20) + 30)
    tuned = plain(settings=("reset",), classifiers=("fine_tuned",))
    assert seconds(tuned) == pytest.approx(images * passes + 30 + 3 * 30 * 4.25)
    assert seconds(plain(classifiers=("linear",))) > 0
    unlabelled = data._replace(labelled=0)
    assert budget.minutes(60, SECOND, unlabelled, plain(classifiers=("linear",))) == 0, "no classifier applies"


def test_every_step_prediction_and_view_of_an_adapter_counts() -> None:
    def passes(name: str, **options: Any) -> float:
        return ADAPTERS[name].config_class(**options).passes

    assert passes("source") == passes("lame") == 1
    assert passes("tent") == 3.25
    assert passes("tent", steps=3, predict="after", parameters="all") == 3 * 4.25 + 1.25
    assert passes("roid") == 2 * 3.25
    assert passes("roid", steps=2, predict="after") == 4 * 3.25 + 1.25
    assert passes("rotta") == 1 + 3.25 + 1.25
    assert passes("rotta", steps=2, update_frequency=32, predict="after") == 2 + 2 * 2 * (3.25 + 1.25)


@pytest.mark.parametrize("backbone", ["pixels", "small"])
def test_the_default_run_is_measured_on_384_images(backbone: str) -> None:
    planned = budget.plan("swav", of(backbone, 28, 1), FASHION_MNIST, values())
    assert (planned.images, planned.reason) == (384, "")
    assert planned.minutes < 1


def test_a_larger_encoder_is_measured_on_fewer_images_or_not_at_all() -> None:
    photographs = budget.Data(test=333, train=1866, labelled=1866, domains=[])
    assert budget.plan("moco", of("medium", 64), photographs, values()).images == 128
    lite = of("timm/tf_efficientnet_lite0", 160)
    few = values(corruptions=values().corruptions[:6])
    assert budget.plan("lite", lite, photographs, few)[::2] == (128, "")
    refused = budget.plan("lite", lite, photographs, values())
    assert refused.reason == (
        "128 test images of each shift would take about 10.8 minutes of one core, and adapt.budget is 6; raise it, "
        "take fewer adapt.corruptions, or name lite in adapt.encoders"
    )
    assert "1000 test images of each shift" in budget.plan("lite", lite, photographs, values(images=1000)).reason
    for measured in (values(encoders=("lite",)), values(budget=11.0)):
        assert budget.plan("lite", lite, photographs, measured)[::2] == (128, "")
    assert budget.plan("lite", lite, photographs, values(budget=None)).images == 384
    assert budget.plan("lite", lite, photographs, values(images=1000, encoders=("lite",)))[::2] == (1000, "")
    assert (
        budget.plan("swav", lite, photographs, values(encoders=("lite",))).reason == "adapt.encoders does not name it"
    )


def test_files_of_domains_are_counted(tmp_path: Path) -> None:
    for name in ("a/one/1.png", "a/two/2.png", "b/3.png", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert budget.domain_sizes(tmp_path) == [2, 1]
    assert budget.domain_sizes(tmp_path / "missing") == []
