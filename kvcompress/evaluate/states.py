"""Hidden states as decoding with the compressed cache gives them: simulated at once, or stepped with the real one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import Attachment


def decoded_states(
    model: Any, attachment: Attachment, ids: Tensor, *, sinks: int, recent: int, block: int = 1
) -> Tensor:
    """ids: [batch, n_tokens], no padding on the left -> final hidden states [batch, n_tokens, d_model].

    Simulated where attention itself reads the cache; `block`: tokens that are encoded together. Other models (latent
    attention, older files) read the text with the real cache, which encodes BLOCK_TOKENS together, between two of
    its steps as generation token by token would: so nothing is seen exactly that generation sees compressed.
    """
    decoder = compat.decoder_of(model)
    if attachment.places.are_all_read or attachment.plan.form == "folded":
        with attachment.simulated(sinks=sinks, recent=recent, block=block):
            states: Tensor = decoder(input_ids=ids, use_cache=True)[0]  # some pass a cache on only then
        return states
    cache = attachment.new_cache(sinks=sinks, recent=recent)
    stops = [*range(recent + BLOCK_TOKENS, ids.shape[1], BLOCK_TOKENS), ids.shape[1]]
    parts, start = [], 0
    for stop in stops:
        output = decoder(input_ids=ids[:, start:stop], use_cache=True, **compat.cache_argument(decoder, cache))
        parts.append(output[0])
        start = stop
    return torch.cat(parts, 1)
