"""Whether two pictures show the same but for a mirror, a crop and the compression: one is laid onto the other.

Grey thumbnails are laid over each other mirrored or not, at a few scales and all shifts, as normalised
cross-correlation (Lewis, Fast Normalized Cross-Correlation, 1995) finds best; scale and shift are then refined by
Gauss-Newton steps (Lucas and Kanade, An Iterative Image Registration Technique, IJCAI 1981).

N images, P pairs of them, S pixels a side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels a side of a thumbnail
_COARSE, _WINDOW = 16, 10  # thumbnail and the part of it that is searched for in another, pixels a side
_SCALES = (14, 16, 18)  # that a coarse thumbnail is brought to: crops of about .9, none, and what crops were made of
_STEPS = 4
_DAMPING = 1e-3  # of the Gauss-Newton steps, as Levenberg and Marquardt have it
_FURTHEST = 0.1  # that one step changes scale or shift
_SCALE_RANGE, _SHIFT_RANGE = (0.75, 1.35), 0.5
_FLAT = 1.0  # grey levels; what varies less has no structure to lay onto another
_PAIRS_AT_ONCE = 512


class Placement(NamedTuple):
    """How the second image of each pair lies on the first: the first's x is at `scale * x + shift` of the second, each
    from -1 to 1 over the image.

    Attributes:
        mirrored: (P,) bool, whether the second is turned left to right first.
        scale: (P,) float32.
        shift: (P, 2) float32, to the right and down.
        correlation: (P,) float32, from -1 to 1, of what both show.
    """

    mirrored: Tensor
    scale: Tensor
    shift: Tensor
    correlation: Tensor

    def of(self, rows: slice | Tensor) -> Placement:
        """That of some of the pairs."""
        return Placement(*(part[rows] for part in self))


def coarse(thumbnails_NSS: Tensor, pairs_P2: Tensor) -> Placement:
    """The best of a few scales and all shifts that keep the middle of the second image on the first.

    Args:
        thumbnails_NSS: Grey levels, float32.
        pairs_P2: Indices of images; fast where pairs of the same first image are neighbours.
    """
    small = F.adaptive_avg_pool2d(thumbnails_NSS[:, None], _COARSE)
    parts = []
    for image in (small, small.flip(-1)):
        for side in _SCALES:
            scaled = F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)
            edge = (side - _WINDOW) // 2
            parts.append(_standard(scaled[:, 0, edge : edge + _WINDOW, edge : edge + _WINDOW].flatten(1)))
    middles = torch.stack(parts, 2)  # N, pixels, mirrors x scales
    places = _COARSE - _WINDOW + 1
    found = []
    for start in range(0, len(pairs_P2), _PAIRS_AT_ONCE):
        first, second = pairs_P2[start : start + _PAIRS_AT_ONCE].unbind(1)
        images, own = torch.unique(first, return_inverse=True)
        windows = _standard(F.unfold(small[images], _WINDOW).transpose(1, 2))  # images, places, pixels
        found.append(torch.bmm(windows[own], middles[second]).flatten(1).max(1))
    best = torch.cat([values for values, _ in found]) if found else thumbnails_NSS.new_empty(0)
    index = torch.cat([where for _, where in found]) if found else pairs_P2.new_empty(0)
    place, way = index // (2 * len(_SCALES)), index % (2 * len(_SCALES))
    corner = torch.stack([place % places, place // places], 1)
    scale = _COARSE / torch.tensor(_SCALES, dtype=torch.float32)[way % len(_SCALES)]
    middle = (corner + _WINDOW / 2) * 2 / _COARSE - 1  # of the second image, on the first
    return Placement(way >= len(_SCALES), scale, -middle * scale[:, None], best)


def refined(thumbnails_NSS: Tensor, pairs_P2: Tensor, start: Placement) -> Placement:
    """Scale and shift to fractions of a pixel; the correlation is that of the details alone.

    Details are what differs from the mean of 5x5 pixels: two shirts agree in shape and shade, copies in their creases.

    Args:
        thumbnails_NSS: As for `coarse`.
        pairs_P2: As for `coarse`.
        start: What `coarse` found.
    """
    parts = []
    for begin in range(0, len(pairs_P2), _PAIRS_AT_ONCE):
        rows = slice(begin, begin + _PAIRS_AT_ONCE)
        parts.append(_refined(thumbnails_NSS, pairs_P2[rows], start.of(rows)))
    return Placement(*map(torch.cat, zip(*parts, strict=True))) if parts else start


def _refined(thumbnails: Tensor, pairs: Tensor, start: Placement) -> Placement:
    first, second = _oriented(thumbnails, pairs, start)
    x, y = grid(SIDE)
    scale, shift = best_scale, best_shift = start.scale, start.shift
    best = torch.full_like(scale, -1.0)
    for step in range(_STEPS):
        moved, seen = lay(second, scale, shift)
        (one, one_size), (other, other_size) = _masked(first, seen), _masked(moved, seen)
        correlation = (one * other).sum((1, 2)) / (one_size * other_size)
        better = correlation > best
        best = torch.where(better, correlation, best)
        best_scale, best_shift = torch.where(better, scale, best_scale), torch.where(better[:, None], shift, best_shift)
        if step == _STEPS - 1:
            break  # nothing would look at another move
        # How the second image, as it lies on the first, changes with scale and shift; contrast and mean are matched.
        down, right = (slope * (SIDE / 2) / scale[:, None, None] for slope in torch.gradient(moved, dim=(1, 2)))
        slopes = [_masked(slope, seen)[0] for slope in (right * x + down * y, right, down)]
        changes = torch.stack(slopes, 3).flatten(1, 2)
        wanted = one * (other_size / one_size)[:, None, None] - other
        normal = changes.transpose(1, 2) @ changes
        damping = _DAMPING * normal.diagonal(dim1=1, dim2=2).mean(1) + _DAMPING
        move = torch.linalg.solve(
            normal + damping[:, None, None] * torch.eye(3), changes.transpose(1, 2) @ wanted.flatten(1)[..., None]
        )[..., 0].clamp(-_FURTHEST, _FURTHEST)
        scale = (scale + move[:, 0]).clamp(*_SCALE_RANGE)
        shift = (shift + move[:, 1:]).clamp(-_SHIFT_RANGE, _SHIFT_RANGE)
    moved, seen = lay(details(second), best_scale, best_shift)
    (one, one_size), (other, other_size) = _masked(details(first), seen), _masked(moved, seen)
    return Placement(start.mirrored, best_scale, best_shift, (one * other).sum((1, 2)) / (one_size * other_size))


def overlaid(thumbnails_NSS: Tensor, pairs_P2: Tensor, placed: Placement) -> tuple[Tensor, Tensor, Tensor]:
    """The first images of the pairs, the second ones as they lie on them, and which pixels both show: (P, S, S) each.

    Args:
        thumbnails_NSS: As for `coarse`.
        pairs_P2: As for `coarse`.
        placed: What `refined` found.
    """
    first, second = _oriented(thumbnails_NSS, pairs_P2, placed)
    return first, *lay(second, placed.scale, placed.shift)


def details(thumbnails_NSS: Tensor) -> Tensor:
    """What differs from the mean of 5x5 pixels, (N, S, S)."""
    around = F.pad(thumbnails_NSS[:, None], (2, 2, 2, 2), mode="replicate")
    return thumbnails_NSS - F.avg_pool2d(around, 5, 1)[:, 0]


def grid(side: int) -> tuple[Tensor, Tensor]:
    """Centres of the pixels of an image, x and y, each (side, side), from -1 to 1 over the image."""
    centres = (2 * torch.arange(side) + 1) / side - 1
    return centres.expand(side, side), centres[:, None].expand(side, side)


def lay(images_PSS: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Images as they lie on others, (P, S, S), and which pixels they cover, (P, S, S) float32 of 0 and 1.

    Args:
        images_PSS: float32, mirrored where they have to be.
        scale: (P,), as in `Placement`.
        shift: (P, 2), likewise.
    """
    x, y = grid(images_PSS.shape[-1])
    where = torch.stack([x, y], 2) * scale[:, None, None, None] + shift[:, None, None]
    seen = (where.abs() <= 1).all(3).float()
    sampled = F.grid_sample(images_PSS[:, None], where, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[:, 0], seen


def _oriented(thumbnails: Tensor, pairs: Tensor, placed: Placement) -> tuple[Tensor, Tensor]:
    second = thumbnails[pairs[:, 1]]
    return thumbnails[pairs[:, 0]], torch.where(placed.mirrored[:, None, None], second.flip(-1), second)


def _masked(levels: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (P, S, S) less their mean where `seen`, zero elsewhere; and their length (P,)."""
    mean = (levels * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
    levels = (levels - mean[:, None, None]) * seen
    return levels, levels.flatten(1).norm(dim=1).clamp_min(_FLAT * SIDE)


def _standard(rows: Tensor) -> Tensor:
    """Rows less their mean, of length 1; those without structure are nearly 0."""
    rows = rows - rows.mean(-1, keepdim=True)
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.clamp_min(_FLAT * rows.shape[-1] ** 0.5)
