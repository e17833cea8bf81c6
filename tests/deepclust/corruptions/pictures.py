"""Images to corrupt: noise, and scenes of smooth shades and shapes."""

import torch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(*shape: int) -> torch.Tensor:
    """Independent uniform values, float64."""
    return torch.rand(shape, generator=seeded(7), dtype=torch.float64)


def scenes(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Ellipses and bars on a slope, in mid-grey so that clipping hides nothing; float64."""
    generator = seeded(5)
    y = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]
    x = torch.linspace(0, 1, width, dtype=torch.float64)
    images = (0.3 + 0.1 * y + 0.1 * x).expand(count, channels, height, width)
    for shape in range(8):
        place = torch.rand((4, count, 1, 1, 1), generator=generator, dtype=torch.float64)
        shade = 0.2 + 0.5 * torch.rand((count, channels, 1, 1), generator=generator, dtype=torch.float64)
        across, down = (x - place[0]) / (0.05 + 0.2 * place[2]), (y - place[1]) / (0.05 + 0.2 * place[3])
        inside = across**2 + down**2 < 1 if shape % 2 else (across.abs() < 1) & (down.abs() < 0.4)
        images = torch.where(inside, shade, images)
    return images
