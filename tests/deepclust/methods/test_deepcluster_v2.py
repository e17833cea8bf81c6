"""DeepCluster-v2 against its formulas in float64, and its memory bank by plain lists."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from deepclust import seeding
from deepclust.clustering import kmeans
from deepclust.errors import ConfigError
from deepclust.methods.deepcluster_v2 import DeepClusterV2
from deepclust.training.views import Crop
from tests.deepclust.methods.toys import backbone, build, embedder, exact_rows, normal, update

IMAGES = 26


def toy(**changes: object) -> DeepClusterV2:
    options = {"crops": [Crop(count=4)], "hidden_dim": 0, "assign_crops": [2, 0], "prototypes": [5, 8, 4]}
    method: DeepClusterV2 = build("deepcluster_v2", backbone(norm=True), 8, **(options | changes))
    method.bind(IMAGES)
    return method


@pytest.mark.reference
@pytest.mark.parametrize("parts", [1, 2])
def test_bank_prototypes_and_loss_over_three_epochs_by_plain_lists(seed: int, parts: int) -> None:
    """The bank: centre views at first, then each image's last embeddings, kept where an epoch left the image out."""
    torch.manual_seed(seed)
    method = toy()
    images = normal(IMAGES, 1, 4, 4, seed=seed)
    network = nn.Sequential(method.backbone, method.head)
    centre = exact_rows(network.eval(), images)
    network.train()
    bank = [centre.copy(), centre.copy()]
    step = 0
    for epoch in range(3):
        method.before_epoch(epoch, embedder(images), seed + epoch)
        np.testing.assert_allclose(method.bank.numpy(), np.array(bank), atol=1e-5)
        for number, prototypes in enumerate(method.prototypes):
            drawn = seeding.derive(seed + epoch, number)
            how = {"iterations": 5, "restarts": 2, "initialisation": "points", "spherical": True}
            found = kmeans.fit(method.bank[number % 2], len(prototypes), seed=drawn, **how)  # type: ignore[arg-type]
            assert torch.equal(prototypes.weight, found.centroids)
            assert torch.equal(method.assignments[number], found.assignments)
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed + epoch))
        for indices in order[:24].split(8):  # two images are left out
            views = [images[indices] + 0.1 * normal(8, 1, 4, 4, seed=seed + 10 * step + n) for n in range(4)]
            before = copy.deepcopy(method)
            results = update(method, step, views, indices, rate=0.2, parts=parts)
            for part, (loss, logged) in enumerate(results):
                # Each resolution goes through batch normalisation as one batch, as all crops do here.
                rows = exact_rows(
                    nn.Sequential(before.backbone, before.head), torch.cat([view.chunk(parts)[part] for view in views])
                ).reshape(4, -1, 6)
                own = indices.chunk(parts)[part]
                losses, ratios, used = [], [], []
                for number, prototypes in enumerate(before.prototypes):
                    clusters = before.assignments[number][own].numpy()
                    logs = log_softmax(rows @ prototypes.weight.double().numpy().T / 0.1, axis=2)
                    losses.append(-logs[:, np.arange(len(own)), clusters].mean())
                    ratios.append(losses[-1] / math.log(len(prototypes)))
                    used.append(len(set(clusters)) / min(len(prototypes), len(own)))
                assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
                assert float(logged["loss_to_chance"]) == pytest.approx(np.mean(ratios), rel=1e-4)
                assert float(logged["prototypes_used"]) == pytest.approx(np.mean(used), rel=1e-5)
                for number, crop in enumerate((2, 0)):
                    bank[number][own.numpy()] = rows[crop]
            step += 1
    assert not np.allclose(bank[0], centre)
    trained = {id(parameter) for group in method.parameter_groups() for parameter in group["params"]}
    assert trained.isdisjoint(map(id, method.prototypes.parameters()))


def test_more_clusters_than_images_are_refused_with_both_numbers() -> None:
    toy(prototypes=[5, 26]).check(26)
    with pytest.raises(ConfigError, match=r"^prototypes: .* 26; got 27"):
        toy(prototypes=[5, 27]).check(26)
