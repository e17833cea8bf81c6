"""PCL against the formulas of the paper in float64, by loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.errors import ConfigError
from deepclust.methods.pcl import PCL, info_nce, proto_nce


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def toy(**changes: object) -> PCL:
    torch.manual_seed(0)
    options = {
        "hidden_dim": 0,
        "dim": 6,
        "key_momentum": 0.9,
        "queue_length": 24,
        "temperature": 0.2,
        "clusters": [20, 30],
        "negatives": 8,
        "warmup_epochs": 1,
        "kmeans_iterations": 5,
    }
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    return PCL(backbone, 8, **(options | changes))  # type: ignore[arg-type]


def data(count: int = 60) -> torch.Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def embed(module: nn.Module) -> torch.Tensor:
    module.eval()
    with torch.no_grad():
        out: torch.Tensor = module(data())
    module.train()
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_info_nce_is_the_papers_in_float64(seed: int) -> None:
    q, k, queue = unit(7, 5, seed=seed), unit(7, 5, seed=seed + 10), unit(11, 5, seed=seed + 20)
    total = 0.0
    for i in range(7):
        logits = np.concatenate([[q[i].double() @ k[i].double()], (queue.double() @ q[i].double()).numpy()]) / 0.2
        total += -math.log(np.exp(logits[0]) / np.exp(logits).sum()) / 7
    assert float(info_nce(q, k, queue, temperature=0.2)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_proto_nce_with_all_clusters_is_the_papers_in_float64(seed: int) -> None:
    q, c = unit(6, 5, seed=seed), unit(9, 5, seed=seed + 10)
    phi = torch.rand(9, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.1
    own = torch.tensor([0, 0, 3, 5, 5, 8])
    total = 0.0
    for i in range(6):
        logits = (c.double() @ q[i].double()).numpy() / phi.double().numpy()
        total += -(logits[own[i]] - np.log(np.exp(logits).sum())) / 6
    found = proto_nce(q, c, phi, own, negatives=9 - 4, generator=torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_negatives_are_nobodys_positive_and_as_many_as_asked() -> None:
    q, c = torch.zeros(4, 5), unit(30, 5)
    own = torch.tensor([2, 2, 7, 11])
    # With zero queries every logit is 0, so the loss is the log of the number of columns.
    found = proto_nce(q, c, torch.ones(30), own, negatives=6, generator=torch.Generator().manual_seed(0))
    assert math.exp(float(found)) == pytest.approx(3 + 6, rel=1e-5)


def test_negatives_differ_between_steps_and_repeat_with_the_generator() -> None:
    q, c, own = unit(4, 5), unit(50, 5, seed=1), torch.tensor([1, 2, 3, 4])
    losses = [
        float(proto_nce(q, c, torch.ones(50), own, negatives=5, generator=torch.Generator().manual_seed(s)))
        for s in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_queue_holds_the_newest_keys_and_not_the_current_batch() -> None:
    method = toy()
    start = method.queue.clone()
    pushed = []
    for step in range(4):
        batch = data()[step * 12 : step * 12 + 12]
        queue_before = method.queue.clone()
        loss, logged = method.loss([batch, batch], torch.arange(12), torch.Generator().manual_seed(step))
        queries = F.normalize(method.head(method.backbone(batch)), dim=1)
        assert method._keys is not None
        expected = info_nce(queries, method._keys, queue_before, temperature=0.2)
        assert float(logged["info_nce"]) == pytest.approx(expected.item(), rel=1e-4)
        pushed.append(method._keys.clone())
        loss.backward()
        method.after_step(step)
    assert torch.equal(method.queue, torch.cat(pushed[2:]))
    assert not torch.equal(method.queue, start)


def test_the_momentum_encoder_moves_by_its_share_and_gets_no_gradient() -> None:
    method = toy()
    key = [p.detach().clone() for p in method.key_encoder.parameters()]
    with torch.no_grad():
        for parameter in [*method.backbone.parameters(), *method.head.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    loss, _ = method.loss([data()[:12], data()[12:24]], torch.arange(12), torch.Generator())
    loss.backward()
    method.after_step(0)
    online = [*method.backbone.parameters(), *method.head.parameters()]
    for before, now, query in zip(key, method.key_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now.double(), 0.9 * before.double() + 0.1 * query.double(), rtol=1e-6, atol=1e-7)
        assert now.grad is None


def test_keys_come_back_in_the_order_of_their_images_and_see_the_statistics_of_their_group() -> None:
    method = toy()
    batch = data()[:16]
    keys = method._shuffled_keys(batch, torch.Generator().manual_seed(4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    expected = torch.empty_like(keys)
    for group in order.view(4, 4):
        expected[group] = F.normalize(method.key_encoder(batch[group]), dim=1)
    torch.testing.assert_close(keys, expected)


def test_clustering_starts_after_the_warm_up_from_raw_centroids_of_the_momentum_features() -> None:
    method = toy()
    method.before_epoch(0, embed, seed=0)
    assert method._granularities == []
    method.before_epoch(1, embed, seed=0)
    features = F.normalize(embed(method.key_encoder), dim=1).double()
    assert [len(prototypes) for prototypes, _, _ in method._granularities] == [20, 30]
    for prototypes, phi, assignments in method._granularities:
        for cluster in assignments.unique():
            mean = features[assignments == cluster].mean(0)
            torch.testing.assert_close(prototypes[cluster].double(), mean / mean.norm(), rtol=1e-3, atol=1e-3)
        assert float(phi.mean()) == pytest.approx(0.2, rel=1e-5)
    loss, logged = method.loss([data()[:6], data()[:6]], torch.arange(6), torch.Generator())
    assert float(loss) == pytest.approx(float(logged["info_nce"] + logged["proto_nce"]), rel=1e-6)


def test_more_clusters_than_images_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"60.*got 99"):
        toy(clusters=[99]).check(60)
