"""SwAV against the formulas of the paper in float64, by loops and plain lists."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from deepclust.methods.swav import SwAV, swapped_loss
from deepclust.training.views import Crop
from tests.deepclust.methods.parts.test_sinkhorn import plain_sinkhorn
from tests.deepclust.methods.toys import Array, as_sets, backbone, build, exact_rows, normal, update

BATCH = 12


def toy(seed: int = 0, **changes: object) -> SwAV:
    torch.manual_seed(seed)
    options = {"batch_size": BATCH, "hidden_dim": 0, "prototypes": [10], "crops": [Crop(count=4)], "queue_length": 0}
    off = {"freeze_prototypes_steps": 0, "hard_assignment_steps": 0}
    method: SwAV = build("swav", backbone(), 8, **(options | off | changes))
    return method


def plain_loss(scores: Array, codes: dict[int, Array], temperature: float = 0.1) -> float:
    """Equations 1, 2 and 6 by loops; scores (crops, batch, K)."""
    total = 0.0
    for i, code in codes.items():
        for v in set(range(len(scores))) - {i}:
            log_p = log_softmax(scores[v] / temperature, axis=1)
            for n in range(scores.shape[1]):
                total += -(code[n] * log_p[n]).sum() / scores.shape[1] / (len(scores) - 1) / len(codes)
    return total


def exact_embeddings(method: SwAV, views: list[torch.Tensor]) -> Array:
    return np.stack([exact_rows(torch.nn.Sequential(method.backbone, method.head), view) for view in views])


def test_no_gradient_flows_through_the_codes() -> None:
    method, scores = toy(), [torch.randn(5, 10, requires_grad=True) for _ in range(2)]
    codes = method._codes(method.prototypes[0], scores)  # type: ignore[arg-type]
    swapped_loss(scores, {0: codes[0]}, temperature=0.1).backward()  # type: ignore[no-untyped-call]
    assert scores[0].grad is None or not scores[0].grad.any()
    assert scores[1].grad is not None


def test_frozen_prototypes_keep_every_bit_in_spite_of_weight_decay_momentum_and_old_gradients() -> None:
    method = toy(freeze_prototypes_steps=2)
    (prototypes,), moved = method.prototypes, []
    optimiser = torch.optim.SGD(method.parameter_groups(), lr=1.0, momentum=0.9, weight_decay=0.1)
    prototypes.weight.grad = torch.ones(10, 6)  # type: ignore[union-attr]
    for step in range(4):
        before = prototypes.weight.detach().clone()
        method.before_step(step)
        loss, _ = method.loss([*normal(4, BATCH, 1, 4, 4, seed=1)], torch.arange(BATCH), torch.Generator())
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(step)
        moved.append(not torch.equal(prototypes.weight, before))
    assert moved == [False, False, True, True]


@pytest.mark.reference
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_logs_and_queue_are_the_papers_over_many_steps_in_float64(seed: int, parts: int) -> None:
    """Three heads, hard codes at first, two resolutions; a queue per assign crop, filled from its epoch on, used when
    full, without the current batch, the newest in."""
    length, assign, hard_steps = 3 * BATCH, (2, 0), 5
    options = {"prototypes": [10, 7, 30], "assign_crops": assign, "hard_assignment_steps": hard_steps}
    method = toy(seed, queue_length=length, **options)
    method.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), method.backbone)
    lists: dict[int, list[Array]] = {crop: [] for crop in assign}
    used = []
    for step in range(12):
        if step % 4 == 0:
            method.before_epoch(step // 4, lambda _: torch.zeros(1), 0)
        views = [*normal(2, BATCH, 1, 4, 4, seed=seed + step), *normal(3, BATCH, 1, 8, 8, seed=seed + step)]
        before = copy.deepcopy(method)
        results = update(method, step, views, torch.arange(BATCH), rate=0.5, parts=parts)
        full = len(lists[0]) == length
        for part, (loss, logged) in enumerate(results):
            embeddings = exact_embeddings(before, [view.chunk(parts)[part] for view in views])
            expected: dict[str, list[float]] = {name: [] for name in ("loss", *logged)}
            for weights in before.prototypes:
                prototypes = weights.weight.detach().double().numpy()
                prototypes = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
                scores, count, soft = embeddings @ prototypes.T, len(prototypes), {}
                for crop in assign:
                    earlier = np.array(lists[crop]) @ prototypes.T if full else np.zeros((0, count))
                    soft[crop] = plain_sinkhorn(np.concatenate([scores[crop], earlier]), 0.05, 3)[: BATCH // parts]
                codes = {crop: np.eye(count)[code.argmax(1)] for crop, code in soft.items()}
                every_code = np.concatenate(list(soft.values()))
                expected["loss"].append(plain_loss(scores, codes if step < hard_steps else soft))
                expected["loss_to_chance"].append(expected["loss"][-1] / math.log(count))
                expected["prototypes_used"].append(len(set(every_code.argmax(1))) / min(count, len(every_code)))
                entropies = [-sum(q * math.log(q) for q in code if q > 0) for code in every_code]
                expected["code_entropy"].append(np.mean(entropies) / math.log(count))
            expected["embedding_spread"].append(embeddings[assign[0]].std(0).mean() * 6**0.5)
            for name, values in expected.items():
                assert float((logged | {"loss": loss})[name]) == pytest.approx(np.mean(values), rel=1e-4), name
        if step >= 4:
            for crop in assign:
                lists[crop] = [*lists[crop], *exact_embeddings(before, views)[crop]][-length:]
        for number, crop in enumerate(assign):
            if len(lists[crop]) == length:
                np.testing.assert_allclose(as_sets(method.queue.rows[number]), as_sets(lists[crop]), atol=1e-5)
        used.append(full)
    assert used == [False] * 7 + [True] * 5
