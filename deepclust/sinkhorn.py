"""Soft codes with a balanced marginal over the prototypes (SwAV, arXiv 2006.09882, equations 3 to 5).

B batch, K prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def codes(scores_BK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Codes that solve max_Q Tr(Qᵀ S) + ε H(Q) over the transport polytope, by Sinkhorn–Knopp.

    In the log domain and float32 at least, so that no ε overflows. The last half step normalises the samples: each
    sample's code sums to 1, the prototypes' marginal B/K holds approximately.

    Args:
        scores_BK: Scores of each sample with each prototype.
        epsilon: Weight of the entropy; towards 0 the codes become hard.
        iterations: Number of alternations, prototypes then samples.

    Returns:
        Codes (B, K), without gradient.
    """
    batch, prototypes = scores_BK.shape
    log_codes = scores_BK.detach().to(torch.promote_types(scores_BK.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        log_codes = log_codes - torch.logsumexp(log_codes, dim=0, keepdim=True) + math.log(batch / prototypes)
        log_codes = log_codes - torch.logsumexp(log_codes, dim=1, keepdim=True)
    return log_codes.exp()
