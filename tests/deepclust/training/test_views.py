"""Batched augmentation against torchvision, one image at a time."""

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from deepclust.models.features import to_float
from deepclust.training import views

STILL = views.Colour(flip=0, jitter=0, brightness=0, contrast=0, saturation=0, hue=0, grey=0, blur=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int = 6, size: int = 28, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, size, size, channels), generator=generator(7), dtype=torch.uint8)


@pytest.mark.parametrize(("size", "flip"), [(28, False), (16, True), (40, False)])
def test_resampling_equals_torchvision_crop_resize_and_flip(size: int, flip: bool) -> None:
    batch = to_float(images())
    boxes = views.random_boxes(6, height=28, width=28, scale=(0.1, 1.0), generator=generator())
    found = views.resample(batch, boxes, torch.full((6,), flip), size=size)
    for image, box, view in zip(batch, boxes.tolist(), found, strict=True):
        expected = tv.resized_crop(image.contiguous(), *box, size=[size, size], antialias=True)
        expected = tv.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0)


def test_boxes_stay_inside_and_cover_the_asked_areas_and_ratios() -> None:
    boxes = views.random_boxes(4000, height=40, width=60, scale=(0.2, 0.6), generator=generator()).double()
    top, left, height, width = boxes.unbind(1)
    assert min(boxes.min(), (40 - top - height).min(), (60 - left - width).min()) >= 0
    share, ratio = height * width / 2400, width / height
    assert 0.17 < share.min() < share.max() < 0.65
    assert abs(share.mean() - 0.4) < 0.02
    assert 0.68 < ratio.min() < ratio.max() < 1.45
    impossible = views.random_boxes(3, height=10, width=100, scale=(1.0, 1.0), generator=generator())
    assert impossible.tolist() == [[0, 43, 10, 13]] * 3  # the centred box


def test_hue_and_grey_equal_torchvisions() -> None:
    batch = to_float(images()).contiguous()
    for shift in (-0.5, -0.13, 0.0, 0.08):
        found = views.shift_hue(batch, torch.tensor(shift))
        torch.testing.assert_close(found, tv.adjust_hue(batch, shift), atol=1e-5, rtol=0)
    expected = tv.rgb_to_grayscale(batch, num_output_channels=1)
    torch.testing.assert_close(views.to_grey(batch), expected, atol=2e-4, rtol=0)


def plain_and_changed(batch: torch.Tensor, **changes: float) -> list[torch.Tensor]:
    """One view of each image, as it is and with the changes, from the same draws."""
    crop = views.Crop(count=1, size=batch.shape[1], scale=(1.0, 1.0))
    colours = (STILL, STILL.replaced(**changes))
    return [views.multi_crop(batch, crops=[crop], colour=c, generator=generator(3))[0] for c in colours]


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation"])
def test_each_part_of_the_jitter_is_torchvisions_with_a_factor_of_its_own_for_each_image(part: str) -> None:
    plain, found = plain_and_changed(images(), jitter=1.0, **{part: 0.5})
    adjust = getattr(tv, f"adjust_{part}")
    candidates = torch.linspace(0.5, 1.5, 1001)
    factors = []
    for before, after in zip(plain, found, strict=True):
        errors = torch.stack([(adjust(before.contiguous(), float(f)) - after).abs().max() for f in candidates])
        assert errors.min() < 2e-3
        factors.append(float(candidates[errors.argmin()]))
    assert len(set(factors)) == len(factors)


def test_blur_equals_a_float64_convolution_inside_the_image_and_keeps_a_constant_one() -> None:
    plain, found = plain_and_changed(images(batch=2, size=60, channels=1), blur=1.0)
    sigmas = torch.linspace(0.1, 2.0, 1901, dtype=torch.float64)
    for before, after in zip(plain.double(), found.double(), strict=True):
        column = before[0, 20:41, 20:41]
        best = min(
            abs(float((torch.outer(w, w) * column[7:14, 7:14]).sum()) - float(after[0, 30, 30]))
            for s in sigmas
            for w in [torch.softmax(-(torch.arange(-3, 4, dtype=torch.float64) ** 2) / (2 * s**2), 0)]
        )
        assert best < 1e-3
    flat, blurred = plain_and_changed(torch.full((2, 60, 60, 1), 90, dtype=torch.uint8), blur=1.0)
    torch.testing.assert_close(blurred, flat)


def test_every_view_is_another_crop_in_the_order_of_resolutions_and_a_generator_repeats_them() -> None:
    crops = [views.Crop(count=2, size=28, scale=(0.2, 0.8)), views.Crop(count=3, size=16, scale=(0.1, 0.4))]
    batch = images(1).repeat(8, 1, 1, 1)
    before = batch.clone()
    found, again = (views.multi_crop(batch, crops=crops, colour=STILL, generator=generator(1)) for _ in range(2))
    assert [view.shape[-1] for view in found] == [28, 28, 16, 16, 16]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(batch, before)
    first, second, *_ = found
    for left, right in [(first[0], first[1]), (first[2], first[5]), (first[0], second[0])]:
        assert (left - right).abs().max() > 0.1
    coloured = views.multi_crop(batch, crops=crops, colour=views.Colour(), generator=generator(1))
    assert all(view.min() >= 0 and view.max() <= 1 for view in coloured)
