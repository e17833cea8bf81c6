"""Weather: snow, frost and fog, drawn by chance. All lengths are pixels of a shorter side of 32 pixels.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from deepclust.corruptions import draws
from deepclust.corruptions.filters import enlarged, magnified, resized, smooth, streaked

# How frost colours red, green and blue: the textures of the benchmark are bluish.
FROST_TINT = (0.88, 0.97, 1.06)
FROST_SIDE = 64


def snow(images: Tensor, strength: tuple[float, ...], generator: Generator) -> Tensor:
    """Whiten the scene and let flakes fall, at most 45° off the vertical.

    The strength: mean and standard deviation of the normal noise the flakes are cut from; how far the noise is
    magnified before; the noise below which there is no flake; length of a flake's trail and σ of its fading; share of
    the scene that is not whitened.
    """
    mean, std, grain, threshold, trail, sigma, kept = strength
    height, width = images.shape[-2:]
    noise, chance = draws.drawn(images, generator, normal=[(1, height, width)], uniform=[()])
    flakes = magnified(mean + std * noise, grain)
    flakes = flakes.masked_fill(flakes < threshold, 0).clamp(0, 1)
    # Only now to the image's size: between the numbers of magnified noise few are beyond the threshold.
    flakes = smooth(enlarged(flakes, max(1.0, draws.pixels(1, images))), draws.pixels(0.2, images))
    slopes = [math.tan((share - 0.5) * math.pi / 2) for share in chance.tolist()]
    flakes = streaked(flakes.mT, slopes, draws.pixels(sigma, images), draws.pixels(trail, images)).mT
    whiter = torch.maximum(images, 1.5 * draws.grey(images) + 0.5)
    return kept * images + (1 - kept) * whiter + flakes + flakes.flip(2, 3)


def frost(images: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Lay ice over the scene: crystals of six needles with branches, in patches.

    The strength is the share of the scene and that of the ice.
    """
    kept, amount = strength
    ice = frost_texture(images, generator)
    if images.shape[1] == 3:
        ice = ice * torch.tensor(FROST_TINT).to(images).view(3, 1, 1)
    return kept * images + amount * ice


def frost_texture(images: Tensor, generator: Generator) -> Tensor:
    """Ice (B, 1, H, W) in [0, 1], one for each image; drawn on a shorter side of 64 pixels at most, and stretched."""
    height, width = images.shape[-2:]
    shrink = max(1.0, min(height, width) / FROST_SIDE)
    rows, columns = math.ceil(height / shrink), math.ceil(width / shrink)
    side = plasma_side(rows, columns)
    seeds, patches, chance = draws.drawn(images, generator, uniform=[(2, rows, columns), (side, side), ()])
    turns = [(share - 0.5) * math.pi / 6 for share in chance.tolist()]
    # One seed in 60 pixels of a 32-pixel side; buds, on the needles, are eight times as dense.
    density = min(1.0, 1 / draws.pixels(math.sqrt(60), seeds) ** 2)
    crystals = _needles(_sparse(seeds[:, :1], density), turns, length=3.5)
    buds = _sparse(seeds[:, 1:], min(1.0, 8 * density)) * crystals
    crystals = torch.maximum(crystals, _needles(buds, turns, length=1.5))
    film = plasma(patches, 1.6, rows, columns)
    ice = (0.1 + 0.45 * film + 0.8 * crystals * (0.2 + 0.8 * film)).clamp(0, 1)
    return resized(ice, height, width)


def _sparse(chance: Tensor, density: float) -> Tensor:
    """Points on a share of the pixels, with a brightness in [0.4, 1]."""
    return torch.where(chance < density, 1 - 0.6 * chance / density, 0)


def _needles(points: Tensor, turns: list[float], length: float) -> Tensor:
    """Six needles from every point, 60° apart and turned by an angle, of σ `length`, at their roots about as bright."""
    sigma = draws.pixels(length, points)
    flat = [math.tan(turn) for turn in turns]
    result = torch.zeros_like(points)
    for flipped in (False, True):
        start = points.flip(2, 3) if flipped else points
        rays = [streaked(start, flat, sigma, 2.5 * sigma)]
        for third in (math.pi / 3, 2 * math.pi / 3):
            steep = [1 / math.tan(turn + third) for turn in turns]
            rays.append(streaked(start.mT, steep, sigma, 2.5 * sigma).mT)
        for ray in rays:
            result = torch.maximum(result, ray.flip(2, 3) if flipped else ray)
    # The sum of half a Gaussian is √(π/2)·σ times its first weight, which `streaked` has divided by it.
    result = result * max(1.0, math.sqrt(math.pi / 2) * sigma)
    return smooth(result, draws.pixels(0.25, points)).clamp(max=1)


def fog(images: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Add a plasma fractal and scale back to the scene's brightest value.

    The strength is the amount of fog and the decay of the fractal (see `plasma`).
    """
    amount, decay = strength
    height, width = images.shape[-2:]
    side = plasma_side(height, width)
    (chances,) = draws.drawn(images, generator, uniform=[(side, side)])
    clouds = plasma(chances, decay, height, width)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images + amount * clouds) * (brightest / (brightest + amount))


def plasma_side(height: int, width: int) -> int:
    """Side of the square that `plasma` needs: the next power of two."""
    return max(2, 1 << (max(height, width) - 1).bit_length())


def plasma(chances: Tensor, decay: float, height: int, width: int) -> Tensor:
    """Plasma fractals by diamonds and squares on a torus, cut to the image and spread over [0, 1].

    Args:
        chances: (B, S, S) uniform in [0, 1), S of `plasma_side`.
        decay: Its square divides the amplitude of the noise whenever the grid is halved; the greater, the smoother.
        height: Of the result, pixels.
        width: Of the result, pixels.

    Returns:
        (B, 1, height, width).
    """
    chances = 2 * chances - 1
    clouds = torch.zeros_like(chances)
    step, amplitude = chances.shape[1], 1.0
    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        squares = (pairs + pairs.roll(-1, 2)) / 4
        middles = squares + amplitude * chances[:, half::step, half::step]
        beside = (middles + middles.roll(1, 1) + (corners + corners.roll(-1, 2))) / 4
        below = (middles + middles.roll(1, 2) + (corners + corners.roll(-1, 1))) / 4
        clouds[:, half::step, half::step] = middles
        clouds[:, ::step, half::step] = beside + amplitude * chances[:, ::step, half::step]
        clouds[:, half::step, ::step] = below + amplitude * chances[:, half::step, ::step]
        step, amplitude = half, amplitude / decay**2
    clouds = clouds[:, None, :height, :width]
    low = clouds.amin(dim=(2, 3), keepdim=True)
    return (clouds - low) / (clouds.amax(dim=(2, 3), keepdim=True) - low).clamp(min=1e-6)
