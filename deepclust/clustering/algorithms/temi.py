"""Exploring the Limits of Deep Image Clustering using Pretrained Models (TEMI), arXiv 2303.17896.

A student learns to have the pointwise mutual information (PMI) of a point and a neighbour of it high, as the clusters
of the student and of its moving average, the teacher, tell it.

Differences: heads are linear, and start from k-means and spectral clusters: from random starts most ended in poorer
optima. Their weights are free, so that the softmax needs no temperature. Pairs are not weighted by default:
with weights the accuracy on digits' features was .587, without .730.

B batch, H heads, K clusters.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from deepclust.clustering import heads
from deepclust.clustering.assigners import Assigner
from deepclust.clustering.base import Problem
from deepclust.clustering.heads import HeadConfig, Heads, Inputs, Objective
from deepclust.config import Flag, Fraction, Positive, config

_LEAST = 1e-12  # of a cluster's marginal probability, which the PMI divides by


@config
class Config(HeadConfig):
    """Options of TEMI."""

    beta: Positive = 0.6
    """β: below 1 all images do not go to few clusters; the lower, the less clusters differ in size."""
    weighted: Flag = False
    """Weight a pair by how probably both are of one cluster, as the teachers of all heads say."""
    teacher_momentum: Fraction = 0.99
    """Of the teacher, an exponential moving average of the student."""
    marginal_momentum: Fraction = 0.9
    """Of the marginal over the clusters, an exponential moving average of the teacher's batches."""


def fit(problem: Problem, options: Config) -> Assigner:
    """Train heads on pairs of neighbours."""
    inputs = Inputs.of(problem.features)
    best = heads.search(inputs, problem, lambda started: TEMI(started, options), options)
    return inputs.assigner(best)


def pmi(student_BHK: Tensor, teacher_BHK: Tensor, marginal_HK: Tensor, beta: float) -> Tensor:
    """log Σ_c (q_s(c|x) q_t(c|x′))^β / q_t(c) of each pair and head (B, H).

    Args:
        student_BHK: log q_s(c|x).
        teacher_BHK: log q_t(c|x′).
        marginal_HK: q_t(c).
        beta: β.
    """
    return heads.logsumexp(beta * (student_BHK + teacher_BHK) - marginal_HK.clamp(min=_LEAST).log())


def agreement(one_BHK: Tensor, other_BHK: Tensor) -> Tensor:
    """Mean over the heads of Σ_c q_t(c|x) q_t(c|x′) of each pair (B, 1), from log-probabilities."""
    return heads.logsumexp(one_BHK + other_BHK).exp().mean(1, keepdim=True)


class TEMI(Objective):
    """The symmetric loss −½ w(x, x′) (pmi(x, x′) + pmi(x′, x))."""

    def __init__(self, heads: Heads, options: Config) -> None:
        super().__init__(heads)
        self.options = options
        self.teacher = copy.deepcopy(heads).requires_grad_(False)
        self.marginal: Tensor | None = None

    def loss(self, points_BP: Tensor, neighbours_BP: Tensor) -> Tensor:
        points, neighbours = (self.heads.log_probabilities(part) for part in (points_BP, neighbours_BP))
        with torch.no_grad():
            taught, taught_neighbours = (self.teacher.log_probabilities(part) for part in (points_BP, neighbours_BP))
            marginal = (taught.exp().mean(0) + taught_neighbours.exp().mean(0)) / 2
            if self.marginal is not None:
                marginal = self.marginal.lerp(marginal, 1 - self.options.marginal_momentum)
            self.marginal = marginal
        both = pmi(points, taught_neighbours, marginal, self.options.beta)
        both = (both + pmi(neighbours, taught, marginal, self.options.beta)) / 2
        weight = agreement(taught, taught_neighbours) if self.options.weighted else 1.0
        return -(weight * both).mean(0)

    def after_step(self) -> None:
        with torch.no_grad():
            for mean, current in zip(self.teacher.parameters(), self.heads.parameters(), strict=True):
                mean.lerp_(current, 1 - self.options.teacher_momentum)
