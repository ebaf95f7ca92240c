"""What a model does after its layers: from hidden states to logits, through its own forward, whatever it is made of.

Final norms, soft caps, scales, projections of the embedding: nothing of it is named here. The model runs with its
decoder (or its layers) standing in for hidden states that are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.compat import GivenOutput, decoder_of
from kvcompress.errors import UnsupportedModelError


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [batch, n_tokens, vocabulary] of final hidden states [batch, n_tokens, d_model]."""
    decoder = decoder_of(model)
    if decoder is model:  # transformers names none (Llama 4): then what comes out first are logits already
        return hidden
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with standing_in([decoder], [lambda *_, **__: GivenOutput(last_hidden_state=hidden)]):
        try:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        except (AttributeError, LookupError, TypeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not supported: its logits are not made of its decoder's last hidden states "
                f"alone ({error}), so what its cache may lose is not known."
            ) from error
    return logits


def after_layers(model: Any, layers: Sequence[nn.Module], hidden: Tensor, ids: Tensor, *, in_tuple: bool) -> Tensor:
    """Return the decoder's final hidden states where the last of its layers has returned `hidden` (in a tuple)."""

    def passing(*_: Any, **__: Any) -> Any:
        return (hidden,) if in_tuple else hidden

    with standing_in(layers, [passing] * len(layers)):
        final: Tensor = decoder_of(model)(input_ids=ids, use_cache=False)[0]
    return final


@contextmanager
def standing_in(modules: Sequence[Any], functions: Sequence[Any]) -> Iterator[None]:
    """Within the block, modules' forwards are these functions."""
    before = [module.__dict__.get("forward") for module in modules]
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own
