"""Triton kernels for decode attention over the packed cache; `decode.packed_attention` is the way in.

Only `layout` imports without Triton.
"""
