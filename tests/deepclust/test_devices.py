"""Nothing mixes the devices, and the host waits for the GPU only where it is meant to: on a GPU that is not there."""

import numpy as np
import pytest
import torch

from deepclust import seeding
from deepclust.adaptation import Guard
from deepclust.corruptions import corrupt
from deepclust.methods.parts.queue import Queue
from deepclust.models import backbones
from deepclust.training import loop, optim, views
from tests.deepclust import gpu
from tests.deepclust.adaptation.nets import LIVELY, classifier, make, stream
from tests.deepclust.corruptions.pictures import scenes, seeded
from tests.deepclust.methods import toys

IMAGES, BATCH, EPOCHS = 40, 16, 3
STEPS = EPOCHS * (IMAGES // BATCH)
# All that the views can do, in two parts a batch.
OPTIONS = {
    "epochs": EPOCHS, "batch_size": BATCH, "accumulate": 2, "crops": [views.Crop(scale=(0.3, 1.0))],
    "optimiser": optim.SGD(rate=0.1, clip_norm=1.0), "colour": views.Colour(),
}  # fmt: skip
# Where the host may wait. In a step of training: once, for the numbers that are logged.
LOG = "loop._Update.prepare"
# k-means decides on the host, once an iteration, whether it goes on; sizes of clusters and masks of rows are counted.
KMEANS = {"fit", "_nearest", "_fetch", "_plus_plus", "_lloyd", "_accumulate", "_refill", "concentration"}
# Before an epoch: features go through numpy, and are clustered.
BEFORE_EPOCH = {"deepcluster_v2.DeepClusterV2.before_epoch", "features.batches", *(f"kmeans.{each}" for each in KMEANS)}
BANK = {"bank.segment_sums", "bank.check_bank"}
# An adapter refuses a batch before it does harm, so it has to know.
ADAPTER = {"classifier.check_images", "base.check_logits"}
LEARNER = ADAPTER | {"normalisation.check_trained_statistics", "base.descend"}
ADAPTER_READS = {
    "source": ADAPTER,
    "tent": LEARNER,
    "pseudo_label": LEARNER | {"pseudo_label.confident_loss"},
    "t3a": ADAPTER | BANK | {"t3a.keep"},
    "tsd": LEARNER | BANK | {"bank.remember", "bank.prototypes", "tsd.distillation_loss"},
    "lame": ADAPTER | {"lame.assign"},
    "rotta": LEARNER | {"rotta.RoTTA._adapt"},
    "roid": LEARNER | {"roid._between_0_and_1"},
    "guarded tent": LEARNER | {"guard.Guard._judge", "guard.Guard._won_by_bn", "guard._spread"},
}
# Angles and JPEG are computed on the CPU, and so is the inverse of Poisson's distribution.
CORRUPTION_READS = {
    "shot_noise": "noise.shot_noise", "motion_blur": "blur.motion_blur", "snow": "weather.snow",
    "frost": "weather.frost_texture", "jpeg_compression": "digital.jpeg_compression",
}  # fmt: skip


def watched(name):
    """What was seen of some epochs of a method, whose queue was full or prototypes clustered in the end."""
    with seeding.seeded(0):
        backbone, dim = backbones.build("small", channels=3, image_size=16)
        method = toys.build(name, backbone, dim, **OPTIONS | ({"queue_start_epoch": 0} if name == "swav" else {}))
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    with gpu.pretended() as device:
        gpu.moved(method)
        device.uploads.clear()
        how = {"seed": 0, "precision": "float32", "normalise": lambda crops: crops}
        assert loop.train(method, images, **how, device=gpu.DEVICE) == STEPS
    assert name != "swav" or method._use_queue
    assert name != "pcl" or method.clustered
    return device


@pytest.mark.parametrize("name", toys.TRAINED)
def test_a_step_reads_back_what_it_logs_and_nothing_else_and_no_copy_to_the_gpu_waits(name):
    seen = watched(name)
    assert [read for read in seen.reads if read not in BEFORE_EPOCH] == [LOG] * STEPS
    once = {"data.Images.__init__", "features.batches", "loop.train", "kmeans._random_points"}
    assert set(seen.uploads) <= once | {"kmeans.concentration"}


@pytest.mark.parametrize("name", ADAPTER_READS)
def test_an_adapter_stays_on_the_models_device_and_reads_what_its_checks_need(name):
    options = {"update_frequency": 9} if name == "rotta" else {}
    with gpu.pretended() as device:
        model = gpu.moved(classifier(LIVELY))
        method = name.removeprefix("guarded ")
        adapter = make(method, model, **options)
        adapter = adapter if method == name else Guard(adapter, model)
        for images in stream(3):
            assert adapter(images.to(gpu.DEVICE)).device == gpu.DEVICE
        adapter.load_state_dict(adapter.state_dict())
        adapter.reset()
    assert set(device.reads) <= ADAPTER_READS[name]


@pytest.mark.parametrize("name", [*CORRUPTION_READS, "glass_blur", "elastic_transform", "rotation"])
def test_a_corruption_is_the_cpus_bit_for_bit_and_reads_what_it_says(name):
    images = scenes(2, 3, 16, 16)
    expected = corrupt(images, name, 3, generator=seeded())
    with gpu.pretended() as device:
        found = corrupt(images.to(gpu.DEVICE), name, 3, generator=seeded())
        assert found.device == gpu.DEVICE
        assert set(device.reads) == {"corruptions._check", CORRUPTION_READS.get(name, "corruptions._check")}
        assert torch.equal(found.cpu(), expected)


def test_a_tensor_of_the_cpus_among_those_of_the_gpus_is_named_with_its_place():
    with gpu.pretended():
        queue = gpu.moved(Queue(8, 4))
        with pytest.raises(AssertionError, match=r"queue\.Queue\.push: .*index_copy_.* \(2, 4\)"):
            queue.push(torch.zeros(2, 4))
