"""MoCo against the formulas of the paper in float64, by loops and plain lists."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from deepclust.errors import ConfigError
from deepclust.methods.moco import MoCo
from tests.deepclust.methods.toys import as_sets, backbone, build, exact_rows, normal, update


def toy(seed: int = 0, **changes: object) -> MoCo:
    """The two encoders differ."""
    torch.manual_seed(seed)
    options = {"hidden_dim": 0, "queue_length": 24, "key_groups": 1, "batch_size": 4}
    method: MoCo = build("moco", backbone(norm=True), 8, **(options | changes))
    with torch.no_grad():
        for parameter in [*method.backbone.parameters(), *method.head.parameters()]:
            parameter.add_(torch.randn(parameter.shape))
    return method


@pytest.mark.reference
@pytest.mark.parametrize(("parts", "length", "hidden"), [(1, 24, 0), (2, 20, 9)])
def test_queue_and_momentum_encoder_are_the_papers_over_many_steps_in_float64(
    seed: int, parts: int, length: int, hidden: int
) -> None:
    """The newest keys in, the oldest out, the current batch not among its own negatives; also across the end."""
    method = toy(seed, queue_length=length, hidden_dim=hidden)
    assert isinstance(method.head, nn.Sequential if hidden else nn.Linear)  # v2's, and v1's
    queue = list(method.queue.rows.double().numpy())
    for step in range(7):
        views = list(normal(2, 8, 1, 4, 4, seed=seed + step))
        before = copy.deepcopy(method)
        results = update(method, step, views, torch.arange(8), rate=0.1, parts=parts)
        keys = []
        for part, (loss, logged) in enumerate(results):
            query_view, key_view = (view.chunk(parts)[part] for view in views)
            queries = exact_rows(nn.Sequential(before.backbone, before.head), query_view)
            keys.append(exact_rows(before.key_encoder, key_view))
            logits = [[query @ key, *(np.array(queue) @ query)] for query, key in zip(queries, keys[-1], strict=True)]
            expected = -log_softmax(np.array(logits) / 0.2, axis=1)[:, 0].mean()  # equation 1
            assert float(loss) == pytest.approx(expected, rel=1e-4)
            assert float(logged["info_nce"]) == pytest.approx(expected, rel=1e-4)
            assert float(logged["loss_to_chance"]) == pytest.approx(expected / math.log(1 + length), rel=1e-4)
            assert float(logged["embedding_spread"]) == pytest.approx(queries.std(0).mean() * 6**0.5, rel=1e-4)
        queue = [*queue, *np.concatenate(keys)][-length:]
        np.testing.assert_allclose(as_sets(method.queue.rows), as_sets(queue), rtol=0, atol=1e-4)
        online = [*method.backbone.parameters(), *method.head.parameters()]
        momentum = method.key_encoder.parameters(), before.key_encoder.parameters()
        for now, was, query in zip(*momentum, online, strict=True):
            torch.testing.assert_close(now.double(), 0.9 * was.double() + 0.1 * query.double(), rtol=1e-5, atol=1e-6)
            assert not now.requires_grad


def test_the_momentum_encoders_batch_norm_has_statistics_of_its_own() -> None:
    method, keys = toy(), normal(8, 1, 4, 4, seed=2)
    _, linear, norm = method.key_encoder[0]
    expected = 0.9 * norm.running_mean + 0.1 * linear(keys.flatten(1)).mean(0)
    update(method, 0, [3 * normal(8, 1, 4, 4, seed=1), keys], torch.arange(8), rate=0.0)
    torch.testing.assert_close(norm.running_mean, expected)


def test_shuffled_keys_come_back_in_order_and_see_the_statistics_of_their_group_which_is_of_two_at_least() -> None:
    method, batch = toy(key_groups=4, batch_size=8), normal(16, 1, 4, 4, seed=3)
    keys = method._keys(batch, torch.Generator().manual_seed(4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    for group in order.view(4, 4):
        np.testing.assert_allclose(keys[group].numpy(), exact_rows(method.key_encoder, batch[group]), atol=1e-5)
    with pytest.raises(ConfigError, match=r"key_groups: expected at most 3, half of the 7 .* got 4"):
        method._keys(batch[:7], torch.Generator())
