"""A layer's codecs and its pages as the kernels take them, or None where they do not."""

from __future__ import annotations

from torch import Tensor

from kvcompress.kernels.chunk import RebuiltLayer, RebuiltSite
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.kernels.paged import ExactPages, PagedLayer, applies, turn_angles
from kvcompress.kernels.paged_rotated import RotatedLayer
from kvcompress.kernels.rebuild import Rotation
from kvcompress.kernels.site import kernels_apply, whole_rotation


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

    key_words, value_words: of paged.page_words. n_tokens: of the longest sequence; most_exact: see PagedLayer.
    """
    device, page_blocks = exact.keys.device, key_words.shape[1]
    if codecs.key_site is None or codecs.value_site is None or codecs.turn == 1 or not compiler_works(device):
        return None
    keys, values, rotary = codecs.key_site.grouped, codecs.value_site.grouped, codecs.rotary
    if keys is None or values is None or rotary is None or not whole_rotation(rotary, codecs.head_dim):
        return None
    sizes = n_heads, codecs.n_kv_heads, codecs.head_dim, keys.layout, values.layout
    if not applies(*sizes, turn=codecs.turn, page_blocks=page_blocks, device=device):
        return None
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
    keys, values = codecs.key_site, codecs.value_site
    if keys is None or values is None or not (keys.packable and values.packable and kernels_apply(exact.keys.device)):
        return None
    if keys.codec.mean is not None or (codecs.rotary is not None and not codecs.cached_rotated):
        return None
    if keys.codec.tiles is not None or key_words.shape[1] % 4:
        return None
    mean = codecs.rotated_mean
    if mean is not None and (codecs.rotary is None or not whole_rotation(codecs.rotary, codecs.head_dim)):
        return None
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
    keys, values, rotary = codecs.key_site, codecs.value_site, codecs.rotary
    if keys is None or values is None or not (keys.packable and values.packable and kernels_apply(exact.keys.device)):
        return None
    if rotary is not None and not whole_rotation(rotary, codecs.head_dim):
        return None
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
