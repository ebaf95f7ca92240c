"""Compiling what decodes keys in turns before there are any: a kernel for each layout, all at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.nvrtc import compile_ahead
from kvcompress.kernels.turned import compiled_as, kernel_source


def compile_turned(layers: Sequence[tuple[LayerKernels, int]], dtype: torch.dtype) -> int:
    """Compile what decodes sequences that are not padded on the left; return how many kernels were not on disk.

    Else each compiles at its layer's first use, one after the other. layers: each with its number of query heads.
    dtype: of queries.
    """
    of_device: defaultdict[torch.device, dict[str, str]] = defaultdict(dict)
    for codecs, n_heads in layers:
        key_site, value_site = codecs.key_site, codecs.value_site
        if key_site is None or value_site is None or dtype == torch.float32:
            continue
        device = key_site.codec.encoder.device
        maps = codecs.turned_maps(n_heads, device)
        if maps is None:
            continue
        nothing = torch.empty(0, 0, 4, dtype=torch.uint8, device=device)
        keys, values = key_site.grouped_site(maps[0], nothing), value_site.grouped_site(maps[1], nothing)
        launch, constants = compiled_as(
            keys, values, n_heads, codecs.n_kv_heads, codecs.head_dim, masked=False, dtype=dtype, device=device
        )
        of_device[device][kernel_source(constants, launch.names)] = launch.names[0]
    return sum(compile_ahead(sources, device) for device, sources in of_device.items())
