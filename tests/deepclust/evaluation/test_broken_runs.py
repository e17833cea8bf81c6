"""Runs that are broken on purpose are caught within two epochs and named rightly; healthy ones raise no alarm."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclust import seeding
from deepclust.evaluation import watchdog
from deepclust.methods import config_class, method_class, simsiam
from deepclust.models import backbones
from deepclust.training import loop
from deepclust.training.optim import SGD
from deepclust.training.views import Colour, Crop

SIZE = 16
CROPS = (Crop(size=SIZE, scale=(0.4, 1.0), ratio=(1.0, 1.0)), Crop(size=9, scale=(0.1, 0.4), ratio=(1.0, 1.0)))
COLOUR = Colour(flip=0.0, jitter=1.0, brightness=0.2, contrast=0.2, blur=0.0)
BATCH = 20  # 60 steps an epoch: after two, every rule has had the patience it asks for
RATES = {"swav": 0.4, "pcl": 0.2, "simsiam": 0.2}
# Those of the parameters' files, with sizes for 1,200 images of six kinds.
OPTIONS = {
    "swav": {"hidden_dim": 64, "dim": 32, "prototypes": [20], "crops": CROPS}
    | {"queue_length": 0, "freeze_prototypes_steps": 0},
    "pcl": {"hidden_dim": 64, "dim": 32, "key_momentum": 0.99, "queue_length": 400, "temperature": 0.1}
    | {"clusters": [60, 120], "negatives": 20, "kmeans_iterations": 10, "warmup_epochs": 0},
    "simsiam": {"hidden_dim": 128, "dim": 128, "predictor_dim": 32, "projector_layers": 2},
}


def drawings(count=1200):
    """Discs, rings, bars, crosses, and gratings of two directions; place, size, contrast and noise are random."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 6, (count, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE][:, None]
    dy, dx = (place - generator.uniform(5, 10, (count, 1, 1)) for place in (y, x))
    size = generator.uniform(2.5, 5, (count, 1, 1))
    radius = np.hypot(dy, dx)
    wave = 2 * np.pi / generator.uniform(3, 6, (count, 1, 1))
    shapes = [
        radius < size,
        np.abs(radius - size) < 1,
        (np.abs(dy) < 1.5) & (np.abs(dx) < 1.5 * size),
        ((np.abs(dy) < 1) | (np.abs(dx) < 1)) & (radius < 1.5 * size),
        0.5 + 0.5 * np.sin(wave * dx),
        0.5 + 0.5 * np.sin(wave * (dx + dy)),
    ]
    drawn = np.choose(kind, shapes) * generator.uniform(100, 200, (count, 1, 1))
    drawn += generator.uniform(0, 40, (count, 1, 1)) + generator.normal(0, 6, (count, SIZE, SIZE))
    return drawn.clip(0, 255).astype(np.uint8)[..., None]


def watched(name, images, *, rate=1.0, epochs=2, **changes):
    """The reports on a short run; `rate` is a factor, `changes` are to the method's options."""
    optimiser = SGD(rate=RATES[name] * rate, weight_decay=5e-4, warmup_epochs=0, final_rate=0.001)
    options = {"epochs": epochs, "batch_size": BATCH, "optimiser": optimiser, "crops": CROPS[:1], "colour": COLOUR}
    with seeding.seeded(0):
        backbone, dim = backbones.build("small", channels=1, image_size=SIZE)
        method = method_class(name)(backbone, dim, config_class(name)(**(options | OPTIONS[name] | changes)))
    mean, std = float(images.mean() / 255), float(max(images.std() / 255, 1e-3))
    how = {"normalise": lambda x: (x - mean) / std, "device": torch.device("cpu"), "seed": 0}
    watch = watchdog.Watchdog(method, images, **how)
    reports = []
    judge = lambda done: reports.append(watch.epoch(done))  # noqa: E731
    loop.train(method, images, precision="float32", on_step=watch.step, on_epoch=judge, **how)
    return reports


@pytest.mark.parametrize("name", RATES)
def test_a_healthy_run_raises_no_alarm(name):
    reports = watched(name, drawings())
    assert [alarm.message for report in reports for alarm in report.alarms] == []


def test_an_epsilon_too_large_is_named_by_its_uniform_codes():
    reports = watched("swav", drawings(), epsilon=1.0)
    assert [alarm.symptom for alarm in reports[-1].alarms] == ["prototype collapse", "loss at ln K"]
    assert "lower epsilon" in reports[-1].alarms[0].message


@pytest.mark.parametrize("name", RATES)
def test_a_rate_100_times_too_large_is_named_diverging(name):
    # The stated rates are for 256 images; batches of 20 would scale them down to what the nets here can stand.
    reports = watched(name, drawings(), rate=100 * 256 / BATCH, epochs=1)
    assert reports[0].alarms[0].symptom == "diverging", [report.indicators["weight_growth"] for report in reports]


def test_simsiam_without_its_stop_gradient_is_named_a_representation_collapse(monkeypatch):
    def without_stop_gradient(p1, p2, z1, z2):
        return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2

    monkeypatch.setattr(simsiam, "symmetric_loss", without_stop_gradient)
    reports = watched("simsiam", drawings())
    assert reports[-1].alarms[0].symptom == "representation collapse"
    assert "stop-gradient" in reports[-1].alarms[0].message
