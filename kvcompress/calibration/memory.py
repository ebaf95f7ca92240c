"""Whether a calibration fits in a given memory, from the headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import OptionError
from kvcompress.model.model_spec import DTYPE_BYTES

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: Rows of logits alive at once (fisher.py), float32, with their softmax and gradient.
_LOGIT_BYTES = 256 * 4 * 3
#: Queries whose scores are alive at once (attention.py), and what is for each on the way back, float32: its weight,
#: its slope and how that came about.
_QUERIES, _SCORE_BYTES = 512, 24
#: What a process takes of a GPU beside what is allocated, before that is looked at (outside.py): CUDA and what a pass
#: there and back needs of its libraries, and what fits need besides.
CONTEXT_BYTES, SOLVING_BYTES = 850_000_000, 550_000_000
#: Of a GPU's memory, what one process can count on; the rest is CUDA's own and lost between blocks.
USABLE_SHARE = 0.92
#: Activations of a layer that is recomputed with gradients, in hidden states: queries, keys, values, the MLP's.
_ACTIVATIONS = 24
#: Of a site that is mixed as a whole, for the square of its width: three sums of float64.
_SUMS_BYTES = 24


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
    hidden = seq_len * spec.hidden_size * size * len(spec.layers)
    sums = sum(_SUMS_BYTES * spec.width(site) ** 2 for site in spec.sites)
    return n_numbers * size + hidden + sums + _window_bytes(checkpoint, dtype, seq_len)


def least_bytes(checkpoint: Checkpoint, dtype: str, seq_len: int) -> int:
    """Return about how many bytes the streamed pass takes: all but layers, two layers, a window, a layer's sums."""
    sums = 2 * max(_SUMS_BYTES * checkpoint.spec.width(site) ** 2 for site in checkpoint.spec.sites)
    return _staying_bytes(checkpoint, dtype) + sums + _window_bytes(checkpoint, dtype, seq_len)


def least_of(checkpoint: Checkpoint, dtype: str, seq_len: int, device: str) -> int:
    """Return the least memory with which a calibration is begun: on a GPU CUDA's own, and what is lost, beside it.

    That is for the pass there and back, and for fits, which take solvers, but no gradients and no logits.
    """
    least = least_bytes(checkpoint, dtype, seq_len)
    if not device.startswith("cuda"):
        return least
    fits = _staying_bytes(checkpoint, dtype) + _score_bytes(checkpoint, seq_len)
    return max(int(least / USABLE_SHARE), int(fits / USABLE_SHARE) + SOLVING_BYTES) + CONTEXT_BYTES


def _staying_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of a streamed model: all but layers, and two layers."""
    layers: dict[str, int] = {}
    outside = 0
    for name, entry in checkpoint.tensors.items():
        found = re.match(r"(.*\.layers\.\d+)\.", name)
        if found:
            layers[found[1]] = layers.get(found[1], 0) + entry.n_numbers
        else:
            outside += entry.n_numbers
    return (outside + 2 * max(layers.values(), default=0)) * DTYPE_BYTES[dtype]


def _window_bytes(checkpoint: Checkpoint, dtype: str, seq_len: int) -> int:
    """Return about how many bytes a window takes: a layer with gradients, its attention, some rows of logits."""
    spec = checkpoint.spec
    hidden = seq_len * spec.hidden_size * DTYPE_BYTES[dtype] * _ACTIVATIONS
    return hidden + _score_bytes(checkpoint, seq_len) + _LOGIT_BYTES * spec.vocab_size


def _score_bytes(checkpoint: Checkpoint, seq_len: int) -> int:
    return max(a.n_heads for a in checkpoint.spec.layers) * min(_QUERIES, seq_len) * seq_len * _SCORE_BYTES


def free_bytes(device: str) -> int | None:
    """Return how many bytes are free on a device, None where that is not told."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def counted_outside(*, solves: bool = False) -> int:
    """Return what a process is counted to take of a GPU beside its tensors; solves: whether sites are fitted there."""
    return CONTEXT_BYTES + (SOLVING_BYTES if solves else 0)


def allocatable(memory: int, *, solves: bool = False) -> int:
    """Return what a process that may take `memory` of a GPU can count on for its tensors; `limited` looks at the GPU.

    solves: whether sites are fitted there.
    """
    return memory - counted_outside(solves=solves)


@contextmanager
def limited(device: str, memory: int | None, *, solves: bool = False) -> Iterator[None]:
    """Within the block, this process takes no more than `memory` of a GPU, what CUDA and its libraries take included.

    solves: whether sites are fitted there. Raises OptionError where that is too little.
    """
    if memory is None or not device.startswith("cuda"):
        yield
        return
    import torch

    from kvcompress.calibration.outside import outside_bytes

    place = torch.cuda.current_device() if device == "cuda" else torch.device(device).index
    torch.cuda.empty_cache()  # what was kept for another use would count twice
    room = memory - outside_bytes(place, solves=solves)
    share = room / torch.cuda.get_device_properties(place).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), place)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"memory {memory / 1e9:.2f} GB is too little for a window of this model. Raise it, or lower --seq-len."
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place)
