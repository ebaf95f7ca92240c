"""What DEFLATE (RFC 1951, zlib's strongest) makes of a cache's codes: KVTC (arXiv 2511.01815) stores caches at rest so.

A live cache cannot be read in this form. So that its Huffman trees fit, bytes of one component lie together: [bytes of
a block, blocks] of each layer and part is one stream.
"""

from __future__ import annotations

import zlib

from kvcompress.runtime.cache import CompressedCache, CompressedLayer


def deflated_nbytes(cache: CompressedCache) -> int:
    """Return the bytes of a cache of one sequence whose packed codes are deflated, or kept where that is no smaller."""
    saved = 0
    for layer in cache.layers:
        if not isinstance(layer, CompressedLayer):
            continue
        for packed in (layer.packed_keys, layer.packed_values):
            if packed is not None:
                stream = packed[0].transpose(0, 1).contiguous().view(-1).cpu().numpy().tobytes()
                saved += max(0, len(stream) - len(zlib.compress(stream, 9)))
    return cache.nbytes() - saved
