"""A layer's codecs and its pages as the kernels take them, or None where they do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.kernels import turned
from kvcompress.kernels.chunk import RebuiltLayer, RebuiltSite
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.nvrtc import compile_ahead, compiler_works
from kvcompress.kernels.page_views import ExactPages
from kvcompress.kernels.paged import PagedLayer, applies, turn_angles
from kvcompress.kernels.paged_rotated import RotatedLayer
from kvcompress.kernels.rebuild import Rotation
from kvcompress.kernels.site import kernels_apply, whole_rotation


def why_not_paged(codecs: LayerKernels, *, n_heads: int, page_blocks: int, device: torch.device) -> str | None:
    """Return why paged_layer takes no such keys in turns, None where it does. page_blocks: of a packed page."""
    if codecs.key_site is None or codecs.value_site is None:
        return "a part of it is kept whole"
    if codecs.turn == 1:
        return "keys are not in turns"
    if not compiler_works(device):
        return "the kernels need an NVIDIA GPU and NVRTC"
    keys, values, rotary = codecs.key_site.grouped, codecs.value_site.grouped, codecs.rotary
    if keys is None or values is None:
        return "its rows have no tiles"
    if rotary is None or not whole_rotation(rotary, codecs.head_dim):
        return "RoPE turns no head as a whole"
    sizes = n_heads, codecs.n_kv_heads, codecs.head_dim, keys.layout, values.layout
    if not applies(*sizes, turn=codecs.turn, page_blocks=page_blocks, device=device):
        return f"the kernels take no {n_heads} heads of {codecs.head_dim} in groups of this size"
    return None


def why_not_rotated(codecs: LayerKernels, *, page_blocks: int, device: torch.device) -> str | None:
    """Return why rotated_layer takes no such keys, None where it does: those that are encoded after RoPE."""
    reason = why_not_rebuilt(codecs, device)
    if reason is not None:
        return reason
    assert codecs.key_site is not None
    if codecs.key_site.codec.mean is not None or (codecs.rotary is not None and not codecs.cached_rotated):
        return "keys are encoded before RoPE"
    if codecs.key_site.codec.tiles is not None or page_blocks % 4:
        return f"its rows lie in tiles, or a page holds {page_blocks} blocks, no multiple of 4"
    return None


def why_not_rebuilt(codecs: LayerKernels, device: torch.device) -> str | None:
    """Return why rebuilt_layer takes no such layer, None where it does."""
    keys, values, rotary = codecs.key_site, codecs.value_site, codecs.rotary
    if keys is None or values is None:
        return "a part of it is kept whole"
    if not kernels_apply(device):
        return "the kernels need an NVIDIA GPU and Triton"
    if not (keys.packable and values.packable):
        return "components have bits that the kernels do not know"
    if rotary is not None and not whole_rotation(rotary, codecs.head_dim):
        return "RoPE turns a part of a head only"
    return None


def paged_layer(
    codecs: LayerKernels,
    key_words: Tensor,
    value_words: Tensor,
    exact: ExactPages,
    *,
    n_heads: int,
    scaling: float,
    n_tokens: int,
    most_exact: int,
) -> PagedLayer | None:
    """Return a layer for paged_attention, or None where its keys are not in turns that the kernels take.

    key_words, value_words: of page_views.page_words. n_tokens: of the longest sequence; most_exact: see PagedLayer.
    """
    device = exact.keys.device
    if why_not_paged(codecs, n_heads=n_heads, page_blocks=key_words.shape[1], device=device) is not None:
        return None
    assert codecs.key_site is not None and codecs.value_site is not None and codecs.rotary is not None
    keys, values, rotary = codecs.key_site.grouped, codecs.value_site.grouped, codecs.rotary
    assert keys is not None and values is not None
    return PagedLayer(
        codecs.key_site.grouped_site(keys, key_words),
        codecs.value_site.grouped_site(values, value_words),
        exact,
        n_heads,
        codecs.turn,
        turn_angles(rotary, codecs.turn, n_tokens, device),
        scaling,
        most_exact,
    )


def compile_layers(layers: Sequence[PagedLayer], *, rank: int = 0, n_ranks: int = 1) -> int:
    """Compile the kernels of layers together, and return how many were not on disk: one for each layout.

    Else each compiles at its layer's first use, one after the other. rank, n_ranks: see nvrtc.compile_ahead.
    """
    if not layers:
        return 0
    sources = {turned.kernel_source(layer.constants, layer.launch.names): layer.launch.names[0] for layer in layers}
    return compile_ahead(sources, layers[0].exact.keys.device, rank=rank, n_ranks=n_ranks)


def rotated_layer(
    codecs: LayerKernels,
    key_words: Tensor,
    value_words: Tensor,
    exact: ExactPages,
    *,
    scaling: float,
    n_tokens: int,
    most_exact: int,
) -> RotatedLayer | None:
    """Return a layer for rotated_attention, or None where its keys are not encoded after RoPE; see paged_layer."""
    if why_not_rotated(codecs, page_blocks=key_words.shape[1], device=exact.keys.device) is not None:
        return None
    keys, values, mean = codecs.key_site, codecs.value_site, codecs.rotated_mean
    assert keys is not None and values is not None
    n_sinks = exact.sink_keys.shape[1]
    return RotatedLayer(
        keys.site(key_words, mean=mean),
        values.site(value_words, mean=values.codec.mean),
        exact,
        None if mean is None else codecs.rotary,
        scaling,
        n_tokens,
        most_exact - n_sinks,
    )


def rebuilt_layer(
    codecs: LayerKernels, key_words: Tensor, value_words: Tensor, exact: ExactPages, scaling: float
) -> RebuiltLayer | None:
    """Return a layer for chunk_attention, or None where a part is not packed in numbers of 16 bits or fewer."""
    if why_not_rebuilt(codecs, exact.keys.device) is not None:
        return None
    keys, values, rotary = codecs.key_site, codecs.value_site, codecs.rotary
    assert keys is not None and values is not None
    if rotary is None:
        mean, rotation = keys.codec.mean, None
    elif codecs.cached_rotated:
        mean = codecs.rotated_mean
        rotation = None if mean is None else Rotation(rotary, mean_only=True)
    else:
        mean, rotation = keys.codec.mean, Rotation(rotary, codecs.turn)
    return RebuiltLayer(
        RebuiltSite(keys.rebuilt, key_words, mean, rotation),
        RebuiltSite(values.rebuilt, value_words, values.codec.mean, None),
        exact,
        scaling,
    )
