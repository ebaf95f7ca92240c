"""Running a peer: decoding windows of text with its real cache, compared with the original as our own is.

A peer's cache is filled and read as generation does it. transformers' layers quantise everything anew whenever their
residual window is full; between two such moments tokens see each other exactly. So decoding token by token equals
forwards over chunks that end where the window is full, and that is what runs here: the real cache object, no
simulation of it. (Chunks differ from single tokens by the order of floating-point sums only; a test compares them.)
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import cache_argument, decoder_of
from kvcompress.evaluate.peer_caches import PeerCache, without_emptying
from kvcompress.evaluate.peer_xkv import Xkv
from kvcompress.evaluate.peers import Peer
from kvcompress.evaluate.perplexity import Evaluation, Original, Progress, compare_states
from kvcompress.model.model_spec import ModelSpec

#: Windows decoded at once on a GPU, where a window alone leaves it waiting for kernels to start.
GPU_BATCH = 8


def evaluate_peer(
    model: Any,
    original: Original,
    peer: Peer | Xkv,
    spec: ModelSpec,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Return how decoding with a peer's cache compares with the original, on the windows of `original`.

    model: the uncompressed model with nothing attached; its dtype may be wider than the checkpoint's, the cache
    stores in the checkpoint's. batch: windows decoded at once, 8 on a GPU and 1 elsewhere by default; one at a time
    for fp8, whose scale is that of a text. (hqq ends its search for zeros by the mean error of the whole batch.)
    `protocol["cache"]` says what was stored, bytes a token with what comes once for a text, and a window's bytes
    measured at its end.
    """
    seq_len = original.windows.ids.shape[1]
    peer.check(spec, seq_len)
    on_gpu = next(model.parameters()).device.type == "cuda"
    batch = peer.at_once or batch or (GPU_BATCH if on_gpu else 1)
    measured = 0

    def decoded(ids: Tensor) -> Tensor:
        nonlocal measured
        cache = peer.cache_for(model, spec, ids)
        states = decoded_states(model, ids, peer, cache)
        measured = cache.nbytes() // len(ids)
        return states

    per_token = peer.bytes_per_token_within(spec, seq_len)
    cache = {"name": peer.name, "stored_dtype": spec.dtype, "bytes_per_token": per_token, "windows_at_once": batch}
    result = compare_states(
        model,
        original,
        decoded,
        keep=per_token / spec.cache_bytes_per_token,
        protocol={"sinks": peer.sinks, "recent": peer.residual, "cache": cache},
        batch=batch,
        progress=progress,
    )
    cache["bytes_at_seq_len"] = measured
    return result


def decoded_states(model: Any, ids: Tensor, peer: Peer | Xkv, cache: PeerCache) -> Tensor:
    """Return the final hidden states [n, n_tokens, d_model] that decoding ids [n, n_tokens] with the cache gives."""
    states = []
    decoder = decoder_of(model)
    on_gpu = ids.device.type == "cuda" and peer.family == "hqq"
    with torch.no_grad(), without_emptying() if on_gpu else nullcontext():
        for chunk in peer.chunks(ids.shape[1]):
            positions = torch.arange(chunk.start, chunk.stop, device=ids.device)[None]
            output = decoder(
                input_ids=ids[:, chunk], position_ids=positions, use_cache=True, **cache_argument(decoder, cache)
            )
            states.append(output.last_hidden_state)
    return torch.cat(states, 1)
