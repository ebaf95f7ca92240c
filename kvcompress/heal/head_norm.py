"""Where the weights of head norms begin: at what leaves a model that was trained without them least changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.runtime.head_norm import HeadNorm


def fit_head_norms(norms: list[HeadNorm], model: Any, ids: Tensor) -> None:
    """Set every weight to the root mean square of its head's output on token ids [n_windows, seq_len]."""
    sums = [torch.zeros(len(norm.weight), dtype=torch.float64, device=norm.weight.device) for norm in norms]
    count = 0

    def measure(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            heads = args[0].unflatten(-1, norms[index].weight.shape).double()
            sums[index] += heads.square().mean(-1).flatten(0, -2).sum(0)
            return args[0]

        return hook

    def unchanged(module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        return args[0]

    handles = [norm.register_forward_pre_hook(measure(i)) for i, norm in enumerate(norms)]
    handles += [norm.register_forward_hook(unchanged) for norm in norms]
    try:
        with torch.no_grad():
            for window in ids.split(1):
                model(input_ids=window, use_cache=False)
                count += window.numel()
    finally:
        for handle in handles:
            handle.remove()
    for norm, total in zip(norms, sums, strict=True):
        norm.weight.data.copy_((total / count).sqrt().unsqueeze(1).to(norm.weight.dtype))
