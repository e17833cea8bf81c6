"""What the watchdog measures, when it speaks, and that it leaves no trace."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from deepclust import seeding
from deepclust.evaluation import metrics, watchdog
from deepclust.methods.parts.base import Method
from deepclust.methods.parts.options import TrainedConfig
from deepclust.models.features import to_float
from deepclust.training import loop

HOW = {"normalise": lambda x: x - 0.5, "device": torch.device("cpu")}
EPOCH = loop.Epoch(0, 1.0, 0.0, 40)


class Embedding(Method):
    """A backbone with what an observer could disturb: batch normalisation, dropout, and one part in eval mode."""

    def __init__(self, dim=12):
        generator = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, dim))
        for parameter in net.parameters():
            nn.init.normal_(parameter, generator=generator)
        super().__init__(net, TrainedConfig(epochs=2, batch_size=10))

    def loss(self, views, indices, generator):
        return (self.backbone(views[0]) - self.backbone(views[1])).square().mean(), {}


def images(count=40):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def watch(method, given=None, seed=0):
    return watchdog.Watchdog(method, images() if given is None else given, seed=seed, **HOW)


def step(number, *, rate=0.1, loss=1.0, norm=1.0, **logged):
    return loop.Step(number, 0, loss, rate, norm, logged)


def report(steps, given=None, name="swav"):
    method = Embedding()
    method.name = name
    dog = watch(method, given)
    for done in steps:
        dog.step(done)
    return dog.epoch(EPOCH)


def symptoms(found):
    return [alarm.symptom for alarm in found.alarms]


def test_training_is_bit_for_bit_the_same_with_and_without_it():
    alone, observed, reports = Embedding(), Embedding(), []
    dog = watch(observed)
    seen = {"on_step": dog.step, "on_epoch": lambda done: reports.append(dog.epoch(done))}
    for method, observer in ((alone, {}), (observed, seen)):
        with seeding.seeded(0):
            loop.train(method, images(), seed=0, precision="float32", **observer, **HOW)
    assert all(torch.equal(observed.state_dict()[key], value) for key, value in alone.state_dict().items())
    assert [done.epoch for done in reports] == [0, 1]


@pytest.mark.parametrize(("dim", "expected"), [(5, ["representation collapse"]), (12, [])])
def test_features_of_five_dimensions_are_a_collapse_of_twelve_none_and_modes_and_gradients_stay(dim, expected):
    method = Embedding(dim)
    method.backbone[3].eval()
    modes = [module.training for module in method.modules()]
    found = watch(method).epoch(EPOCH)
    assert 3 < found.indicators["rankme"] < dim
    assert symptoms(found) == expected
    assert [module.training for module in method.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in method.parameters())


def test_rankme_is_that_of_the_features_in_eval_mode_of_a_sample_that_its_seed_decides():
    def rank(given, seed=0):
        return watch(method, given, seed).epoch(EPOCH).indicators["rankme"]

    method, many = Embedding(), images(watchdog.SAMPLE + 100)
    assert rank(many) == rank(many) != rank(many, seed=1)
    found = rank(images())
    with torch.no_grad():
        rows = method.eval().backbone(to_float(torch.from_numpy(images())) - 0.5)
    assert found == pytest.approx(metrics.rankme(rows.numpy()), rel=1e-5)


def test_a_few_images_have_no_rank_that_could_be_judged():
    method = Embedding()
    assert "rankme" not in watch(method, images(watchdog.RANKME_FROM_IMAGES - 1)).epoch(EPOCH).indicators
    assert "rankme" in watch(method, images(watchdog.RANKME_FROM_IMAGES)).epoch(EPOCH).indicators


def test_numbers_of_the_steps_are_means_over_the_last_ones_of_the_epoch():
    indicators = report([step(n, loss=float(n), norm=2.0 * n) for n in range(watchdog.RECENT + 30)]).indicators
    expected = 30 + (watchdog.RECENT - 1) / 2
    assert (indicators["loss"], indicators["gradient_norm"]) == pytest.approx((expected, 2 * expected))
    assert symptoms(report([step(n, norm=math.inf if n < 6 else 1.0) for n in range(10)])) == ["non-finite"]


def test_weight_growth_is_the_geometric_mean_over_the_matrices_and_features_must_be_finite():
    method = Embedding()
    dog = watch(method)
    with torch.no_grad():
        method.backbone[1].weight.mul_(9.0)
        method.backbone[2].weight.mul_(100.0)
        assert dog.epoch(EPOCH).indicators["weight_growth"] == pytest.approx(3.0)
        method.backbone[1].weight[0, 0] = math.nan
    found = dog.epoch(EPOCH)
    assert symptoms(found)[0] == "non-finite"
    assert "rankme" not in found.indicators


def test_images_that_do_not_vary_are_told_apart():
    alike, flat = np.repeat(images(1), 40, axis=0), np.arange(40, dtype=np.uint8).repeat(64).reshape(40, 8, 8, 1) * 6
    for given, indicator, what in ((alike, "image_variation", "alike"), (flat, "flat_images", "one flat colour")):
        found = report([step(0)], given)
        assert (found.alarms[0].symptom, found.alarms[0].indicator) == ("constant images", indicator)
        assert what in found.alarms[0].message


COLLAPSE, PROTOTYPES, AT_CHANCE = ["representation collapse"], ["prototype collapse"], ["loss at ln K"]
HEALTHY = {"loss_to_chance": 0.7, "embedding_spread": 0.97, "prototypes_used": 0.8, "code_entropy": 0.5}


@pytest.mark.parametrize(
    ("name", "logged", "expected", "line"),
    [
        ("swav", HEALTHY, [], ""),
        ("swav", {"prototypes_used": 0.05}, PROTOTYPES, ""),
        ("swav", {"code_entropy": 0.999}, PROTOTYPES, ""),
        ("swav", {"embedding_spread": 0.01}, COLLAPSE, ""),
        ("swav", {"code_entropy": 1.0, "loss_to_chance": 1.0}, [*PROTOTYPES, *AT_CHANCE], ""),
        ("swav", {"loss_to_chance": 0.999}, AT_CHANCE, "loss_from_chance 0.001, below 0.01; lower epsilon (0.03), "),
        ("moco", {"loss_to_chance": 0.999}, AT_CHANCE, "loss_from_chance 0.001, below 0.01; lower optimiser.rate "),
        ("simsiam", {"embedding_spread": 0.6}, COLLAPSE, "embedding_spread 0.6, below "),
    ],
)
def test_a_symptom_is_named_in_a_line_by_the_methods_bounds_and_the_root_cause_is_first(name, logged, expected, line):
    found = report([step(n, **logged) for n in range(watchdog.PATIENCE + 1)], name=name)
    assert symptoms(found) == expected
    for alarm in found.alarms:
        assert alarm.message.startswith(f"{alarm.symptom}: {line}")
        assert "\n" not in alarm.message


def test_a_loss_is_rising_by_its_start_or_by_chance_whichever_is_larger():
    diverging = ["diverging"]
    for start, later, expected in [(1.0, 1.3, diverging), (0.5, 1.1, []), (1.3, 1.4, []), (1.3, 2.0, diverging)]:
        found = report([step(0, loss_to_chance=start), *(step(n, loss_to_chance=later) for n in range(1, 80))])
        assert found.indicators["loss_rise"] == pytest.approx(later / max(1.0, start))
        assert symptoms(found) == expected


def test_a_loss_that_passes_through_chance_does_not_stay_there():
    falling = np.linspace(1.1, 0.9, watchdog.RECENT)
    started = [step(n, loss_to_chance=0.9) for n in range(watchdog.PATIENCE)]
    found = report([*started, *(step(n, loss_to_chance=float(value)) for n, value in enumerate(falling))])
    assert found.indicators["loss_to_chance"] == pytest.approx(1.0)
    assert found.indicators["loss_from_chance"] == pytest.approx(0.05, abs=0.005)
    assert symptoms(found) == []


def test_a_loss_at_chance_is_judged_after_the_warm_up_only():
    dog = watch(Embedding())
    total = watchdog.PATIENCE + 100
    for n in range(total):
        dog.step(step(n, rate=0.001 * (n + 1), loss_to_chance=1.0, code_entropy=1.0))
    assert symptoms(dog.epoch(EPOCH)) == []
    for n in range(watchdog.PATIENCE):
        dog.step(step(total + n, rate=0.001 * total, loss_to_chance=1.0))
    assert symptoms(dog.epoch(EPOCH)) == ["loss at ln K"]
