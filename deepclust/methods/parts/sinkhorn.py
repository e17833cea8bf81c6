"""Soft codes with a balanced marginal over the prototypes (SwAV, arXiv 2006.09882, equations 3 to 5).

B batch, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepclust import distributed


@torch.no_grad()
def codes(scores_BK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Codes that solve max_Q Tr(Qᵀ S) + ε H(Q) over the transport polytope, by Sinkhorn–Knopp.

    The batch is that of all processes, of which each gives its rows and gets their codes.

    In the log domain, so that no ε overflows or divides by zero. The last half step normalises the samples: each
    sample's code sums to 1, the prototypes' marginal B/K holds approximately.

    Args:
        scores_BK: Scores of each sample with each prototype.
        epsilon: Weight of the entropy; towards 0 the codes become hard.
        iterations: Number of alternations, prototypes then samples.

    Returns:
        Codes (B, K), float32 at least, without gradient.
    """
    # A score's last bit, divided by ε, is an error of its code: at ε = .005 half of float32's digits are gone. float64
    # is no slower at a small ε either, where the exponentials would be float32's denormal numbers.
    log_codes = scores_BK.detach().double() / epsilon
    for _ in range(iterations):
        # Each prototype to sum 1, not B/K: that factor is the same for a whole sample, so the next half step takes it.
        log_codes = distributed.log_softmax(log_codes).log_softmax(1)
    return log_codes.exp_().to(torch.promote_types(scores_BK.dtype, torch.float32))
