"""Drawing tokens by their probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token of each row, drawn from its probabilities [n, vocabulary], float32: [n, 1].

    On a processor where a random number falls among the sums of probabilities: torch.multinomial draws one number for
    every token of the vocabulary there, one after the other, which takes ten times as long.
    """
    if probability.is_cuda:
        return torch.multinomial(probability, 1, generator=generator)
    sums = probability.cumsum(-1)
    number = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    # `right`, so that a token without probability, whose sum is that of the one before it, is never met
    return torch.searchsorted(sums, number, right=True).clamp_max(sums.shape[1] - 1)
