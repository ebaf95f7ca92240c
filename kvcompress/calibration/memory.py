"""Whether a calibration fits in a given memory, from the headers alone."""

from __future__ import annotations

import re

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import OptionError
from kvcompress.model.model_spec import DTYPE_BYTES

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: Rows of logits alive at once (fisher.py), float32, with their softmax and gradient.
_LOGIT_BYTES = 256 * 4 * 3
#: Activations of a layer that is recomputed with gradients, in hidden states: queries, keys, values, the MLP's.
_ACTIVATIONS = 24


def parse_bytes(text: str) -> int:
    """Return the bytes that a text means: 20GB, 6.5 GiB, 800M. Raises OptionError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise OptionError(f"memory '{text[:40]}' is no size. Give it as 20GB, 6.5GiB or 800MB.")
    units = _BINARY_UNITS if match[3] else _UNITS
    return int(float(match[1]) * units[match[2].upper()])


def whole_bytes(checkpoint: Checkpoint, dtype: str, seq_len: int) -> int:
    """Return about how many bytes the pass with the whole model takes on its device, the sums included."""
    spec, size = checkpoint.spec, DTYPE_BYTES[dtype]
    n_numbers = sum(entry.n_numbers for entry in checkpoint.tensors.values())
    hidden = seq_len * spec.hidden_size * size * (len(spec.layers) + _ACTIVATIONS)
    sums = sum(16 * spec.width(site) ** 2 for site in spec.sites)
    return n_numbers * size + hidden + _LOGIT_BYTES * spec.vocab_size + sums


def least_bytes(checkpoint: Checkpoint, dtype: str, seq_len: int) -> int:
    """Return about how many bytes the streamed pass takes: all but layers, two layers, a window, a layer's sums."""
    spec, size = checkpoint.spec, DTYPE_BYTES[dtype]
    layers: dict[str, int] = {}
    outside = 0
    for name, entry in checkpoint.tensors.items():
        found = re.match(r"(.*\.layers\.\d+)\.", name)
        if found:
            layers[found[1]] = layers.get(found[1], 0) + entry.n_numbers
        else:
            outside += entry.n_numbers
    weights = outside + 2 * max(layers.values(), default=0)
    sums = 2 * max(16 * spec.width(site) ** 2 for site in spec.sites)
    return weights * size + seq_len * spec.hidden_size * size * _ACTIVATIONS + _LOGIT_BYTES * spec.vocab_size + sums
