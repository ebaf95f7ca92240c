"""How much each token of a window counts: where C, the mean and the samples of a site are those of weighed tokens.

What a token's error costs is (g . e)^2. The moments C and F say of g and e what they say apart, but a few tokens have
both large gradients and numbers unlike those of others, and it is them that components and steps must suit. So a token
counts as its gradient does: g^T F^-1 g, with F of the window's own gradients, head by head. The square of g alone would
be that of the few directions in which gradients are largest (docs/measurements.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.whitening import FISHER_RIDGE


def leverages(g: Tensor, n_heads: int) -> Tensor:
    """Return of each token how much it counts: [n_tokens], float64, their mean 1; all alike where there is no gradient.

    g: [n_tokens, n], the gradients of a window's tokens at a site; n_heads: its KV heads.
    """
    largest = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
    by_head = (g / largest).float().unflatten(1, (n_heads, -1)).permute(1, 2, 0)  # [n_heads, head_dim, n_tokens]
    fisher = by_head @ by_head.mT / len(g)
    identity = torch.eye(fisher.shape[1], device=fisher.device).expand_as(fisher)
    ridge = (FISHER_RIDGE * fisher.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(torch.finfo(torch.float32).tiny)
    root, _ = torch.linalg.cholesky_ex(fisher + ridge[:, None, None] * identity)  # what is not finite stays so
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)  # its columns are far fewer than tokens
    weight = (inverse @ by_head).square().mean((0, 1)).double()
    mean = weight.mean()
    return torch.where(mean == 0, 1.0, weight / mean)


def spread_over(weight: Tensor, n: int) -> Tensor:
    """Return which n tokens are evenly spread over the sum of weights: [n] indices, rising, the heaviest repeatedly.

    weight: [n_tokens], float64.
    """
    reached = weight.cumsum(0)
    places = (torch.arange(n, device=weight.device) + 0.5) / n * reached[-1]
    return torch.searchsorted(reached, places).clamp_max(len(weight) - 1)
