"""The second view, against a naive one image by image, and its invariances."""

import pytest
import torch

from deepclust.adaptation.views import BRIGHTNESS, CONTRAST, NOISE, view
from tests.deepclust.adaptation.nets import seeded


def images(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64) * 3 - 1


@pytest.mark.parametrize(("shape", "flip"), [((6, 2, 33, 48), True), ((6, 1, 3, 4), False)])
def test_a_view_is_that_of_each_image_alone(shape, flip):
    batch, generator = images(*shape), seeded(5)
    got = view(batch, generator=seeded(5), flip=flip)
    count, _, height, width = shape
    down = torch.randint(-(height // 16), height // 16 + 1, (count, 1), generator=generator)
    right = torch.randint(-(width // 16), width // 16 + 1, (count, 1), generator=generator)
    turned = torch.rand((count, 1), generator=generator) < 0.5 if flip else torch.zeros(count, 1, dtype=torch.bool)
    contrast, brightness = (torch.rand((count, 1, 1, 1), generator=generator) for _ in range(2))
    noise = torch.randn(shape, generator=generator)
    assert height < 16 or (down.any() and right.any())
    assert turned.any() == flip
    scale = ((batch - batch.mean()) ** 2).mean().sqrt().item()
    for i in range(count):
        rows = [min(max(y + down[i].item(), 0), height - 1) for y in range(height)]
        columns = [min(max(x + right[i].item(), 0), width - 1) for x in range(width)]
        moved = (batch[i].flip(-1) if turned[i] else batch[i])[:, rows][:, :, columns]
        truth = moved.mean() + (moved - moved.mean()) * (1 + CONTRAST * (2 * contrast[i].item() - 1))
        truth += BRIGHTNESS * (2 * brightness[i].item() - 1) * scale + NOISE * noise[i].double() * scale
        torch.testing.assert_close(got[i], truth.clamp(batch.min().item(), batch.max().item()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 1, 1, 1), (2, 1, 3, 4, 5)])
def test_any_size_and_any_number_of_dimensions_will_do_and_the_global_generator_is_untouched(shape):
    batch, before = images(*shape), torch.get_rng_state()
    given = batch.clone()
    assert view(batch, generator=seeded(0), flip=True).shape == batch.shape
    assert torch.equal(batch, given)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_view_keeps_the_scale_of_the_images_and_leaves_equal_pixels():
    batch = images(6, 3, 32, 32)
    got = view(batch * 100 + 7, generator=seeded(0), flip=True)
    torch.testing.assert_close(got, view(batch, generator=seeded(0), flip=True) * 100 + 7)
    grey = torch.full((3, 1, 20, 20), 0.25)
    assert torch.equal(view(grey, generator=seeded(0), flip=True), grey)
