"""Triton kernels for decode attention over the packed cache; `decode.packed_attention` is the way in.

Only `layout` and `arguments` import without Triton.
"""
