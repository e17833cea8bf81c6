"""SwAV against the formulas of the paper in float64, by loops and plain lists."""

import copy
import math

import numpy as np
import pytest
import torch

from deepclust.methods.parts import heads
from deepclust.methods.swav import Config, SwAV, harden, swapped_loss
from deepclust.training.views import Crop
from tests.deepclust.methods.parts.test_sinkhorn import plain_sinkhorn
from tests.deepclust.methods.toys import Array, as_sets, backbone, embedder, exact_rows, log_softmax, normal, update

BATCH = 12


def toy(seed: int = 0, **changes: object) -> SwAV:
    torch.manual_seed(seed)
    options = {
        "batch_size": BATCH,
        "crops": [Crop(count=4)],
        "hidden_dim": 0,
        "dim": 6,
        "prototypes": [10],
        "freeze_prototypes_steps": 0,
        "queue_length": 0,
        "queue_start_epoch": 0,
    }
    return SwAV(backbone(), 8, Config(**(options | changes)))  # type: ignore[arg-type]


def crops(count: int = 4, batch: int = BATCH, seed: int = 1) -> list[torch.Tensor]:
    return list(normal(count, batch, 1, 4, 4, seed=seed))


def plain_loss(scores: Array, codes: dict[int, Array], temperature: float = 0.1) -> float:
    """Equations 1, 2 and 6 by loops; scores (crops, batch, K)."""
    total = 0.0
    for i, code in codes.items():
        others = sorted(set(range(len(scores))) - {i})
        for v in others:
            log_p = log_softmax(scores[v] / temperature)
            for n in range(scores.shape[1]):
                total += -(code[n] * log_p[n]).sum() / scores.shape[1] / len(others) / len(codes)
    return total


def exact_embeddings(method: SwAV, views: list[torch.Tensor]) -> Array:
    return np.stack([exact_rows(torch.nn.Sequential(method.backbone, method.head), view) for view in views])


def exact_prototypes(method: SwAV) -> list[Array]:
    rows = [prototypes.weight.detach().double().numpy() for prototypes in method.prototypes]
    return [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows]


@pytest.mark.reference
@pytest.mark.parametrize("assign", [(0, 1), (0,), (2, 0)])
def test_the_loss_is_the_papers_in_float64(assign: tuple[int, ...], seed: int) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, (4, BATCH, 10))
    codes = {crop: plain_sinkhorn(scores[crop], 0.05, 3) for crop in assign}
    found = swapped_loss(
        list(torch.from_numpy(scores).float()),
        {crop: torch.from_numpy(code).float() for crop, code in codes.items()},
        temperature=0.1,
    )
    assert float(found) == pytest.approx(plain_loss(scores, codes), rel=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("hard", [False, True])
def test_the_whole_method_is_the_mean_over_its_heads_in_float64(seed: int, hard: bool) -> None:
    method = toy(seed, prototypes=[10, 7, 30], assign_crops=[2, 0], hard_assignment_steps=int(hard))
    views = crops(seed=seed)
    method.before_step(0)
    loss, logged = method.loss(views, torch.arange(BATCH), torch.Generator())
    embeddings = exact_embeddings(method, views)
    expected: dict[str, list[float]] = {"loss": [], "loss_to_chance": [], "prototypes_used": [], "code_entropy": []}
    for prototypes in exact_prototypes(method):
        scores, count = embeddings @ prototypes.T, len(prototypes)
        soft = {i: plain_sinkhorn(scores[i], 0.05, 3) for i in (2, 0)}
        codes = {i: np.eye(count)[code.argmax(1)] for i, code in soft.items()} if hard else soft
        every_code = np.concatenate(list(soft.values()))
        expected["loss"].append(plain_loss(scores, codes))
        expected["loss_to_chance"].append(expected["loss"][-1] / math.log(count))
        expected["prototypes_used"].append(len(set(every_code.argmax(1))) / min(count, 2 * BATCH))
        expected["code_entropy"].append(
            np.mean([-sum(q * math.log(q) for q in code if q > 0) for code in every_code]) / math.log(count)
        )
    for name, values in expected.items():
        found = loss if name == "loss" else logged[name]
        assert float(found.detach()) == pytest.approx(np.mean(values), rel=1e-4), name
    spread = embeddings[2].std(0).mean() * 6**0.5
    assert float(logged["embedding_spread"]) == pytest.approx(spread, rel=1e-5)


def test_crops_of_several_resolutions_each_go_through_the_backbone_as_they_are() -> None:
    method = toy()
    method.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), method.backbone)
    views = [*crops(2), *normal(3, BATCH, 1, 8, 8, seed=5)]
    method.before_step(0)
    loss, _ = method.loss(views, torch.arange(BATCH), torch.Generator())
    scores = exact_embeddings(method, views) @ exact_prototypes(method)[0].T
    codes = {i: plain_sinkhorn(scores[i], 0.05, 3) for i in (0, 1)}
    assert float(loss.detach()) == pytest.approx(plain_loss(scores, codes), rel=1e-5)


def test_no_gradient_flows_through_the_codes() -> None:
    scores = [torch.randn(5, 10, requires_grad=True) for _ in range(2)]
    loss = swapped_loss(scores, {0: torch.softmax(scores[0].detach(), 1)}, temperature=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert scores[0].grad is None or not scores[0].grad.any()
    assert scores[1].grad is not None
    method = toy()
    codes = method._codes(method.prototypes[0], [scores[0], scores[1]])  # type: ignore[arg-type]
    assert not any(code.requires_grad for code in codes.values())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_prototypes_keep_every_bit_in_spite_of_weight_decay_and_momentum(decay: float) -> None:
    method = toy(freeze_prototypes_steps=2, prototypes=[10, 7])
    groups = method.parameter_groups()
    optimiser = torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=decay)
    moved = []
    for step in range(4):
        before = [prototypes.weight.detach().clone() for prototypes in method.prototypes]
        method.before_step(step)
        optimiser.zero_grad()
        loss, _ = method.loss(crops(), torch.arange(BATCH), torch.Generator())
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        method.after_step(step)
        moved.append([not torch.equal(now.weight, was) for now, was in zip(method.prototypes, before, strict=True)])
    assert moved == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]


def test_a_gradient_from_before_the_freeze_does_not_move_the_prototypes() -> None:
    method = toy(freeze_prototypes_steps=1)
    method.prototypes[0].weight.grad = torch.ones(10, 6)  # type: ignore[union-attr]
    method.before_step(0)
    assert method.prototypes[0].weight.grad is None


def test_prototypes_have_unit_length_when_they_score() -> None:
    method = toy()
    with torch.no_grad():
        method.prototypes[0].weight.mul_(7)  # type: ignore[operator]
    method.before_step(0)
    torch.testing.assert_close(method.prototypes[0].weight.norm(dim=1), torch.ones(10))  # type: ignore[operator]


def test_hard_codes_last_for_the_first_steps_only() -> None:
    assert harden(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.0, 0.1]])).tolist() == [[0, 1, 0], [1, 0, 0]]
    method, always, never = (toy(hard_assignment_steps=steps) for steps in (2, 9, 0))
    for step in range(4):
        losses = []
        for each in (method, always, never):
            each.before_step(step)
            losses.append(float(each.loss(crops(), torch.arange(BATCH), torch.Generator())[0].detach()))
        assert losses[0] == losses[1 if step < 2 else 2]
        assert losses[1] != losses[2]


@pytest.mark.reference
@pytest.mark.parametrize("parts", [1, 2])
def test_the_queue_is_the_papers_over_many_steps_by_plain_lists(seed: int, parts: int) -> None:
    """Per assign crop: filled from its epoch on, used when full, without the current batch, the newest in."""
    length, assign = 3 * BATCH, (2, 0)
    method = toy(seed, prototypes=[10, 7], assign_crops=assign, queue_length=length, queue_start_epoch=1)
    lists: dict[int, list[Array]] = {crop: [] for crop in assign}
    used, step = [], 0
    for epoch in range(3):
        method.before_epoch(epoch, embedder(torch.zeros(1)), 0)
        for _ in range(4):
            views = crops(seed=seed + step)
            before = copy.deepcopy(method)
            results = update(
                method,
                step,
                [([view.chunk(parts)[n] for view in views], torch.arange(BATCH // parts)) for n in range(parts)],
                rate=0.5,
            )
            full = len(lists[0]) == length
            for part, (loss, _) in enumerate(results):
                embeddings = exact_embeddings(before, [view.chunk(parts)[part] for view in views])
                losses = []
                for prototypes in exact_prototypes(before):
                    scores = embeddings @ prototypes.T
                    codes = {}
                    for crop in assign:
                        earlier = np.array(lists[crop]) @ prototypes.T if full else np.zeros((0, len(prototypes)))
                        codes[crop] = plain_sinkhorn(np.concatenate([scores[crop], earlier]), 0.05, 3)[: BATCH // parts]
                    losses.append(plain_loss(scores, codes))
                assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
            if epoch >= 1:
                for crop in assign:
                    lists[crop] = [*lists[crop], *exact_embeddings(before, views)[crop]][-length:]
            for number, crop in enumerate(assign):
                if len(lists[crop]) == length:
                    expected = as_sets(torch.from_numpy(np.array(lists[crop])))
                    np.testing.assert_allclose(as_sets(method.queue.rows[number]), expected, atol=1e-5)
            used.append(full)
            step += 1
    assert used == [False] * 7 + [True] * 5


def test_without_a_queue_nothing_is_kept_of_a_step() -> None:
    method = toy()
    update(method, 0, [(crops(), torch.arange(BATCH))], rate=0.1)
    assert method.queue.rows.numel() == 0
    assert int(method.queue.pushed) == 0


def test_exported_prototypes_assign_images_as_the_method_does() -> None:
    method = toy(prototypes=[10, 7])
    update(method, 0, [(crops(), torch.arange(BATCH))], rate=0.5)  # leaves rows that are not of unit length
    exported = method.exported()
    images = crops()[0]
    embeddings = exact_embeddings(method, [images])[0]
    head = heads.load_projection(exported["projection"])
    for number, prototypes in enumerate(exact_prototypes(method)):
        found = heads.prototype_scores(head, exported["prototypes"][str(number)], method.backbone(images))
        np.testing.assert_allclose(found.numpy(), embeddings @ prototypes.T, atol=1e-6)
