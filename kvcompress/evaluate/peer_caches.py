"""Other people's quantised caches, as transformers Cache objects that a forward pass can be given.

`hqq` and `quanto` are transformers' own layers, untouched but for one thing each on the way (said where). `fp8` and
`kivi` are written here, because transformers' releases before 5.2x have no fp8 and none has KIVI.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvcompress.compat import Cache, DynamicLayer, quantised_layer
from kvcompress.errors import OptionError
from kvcompress.runtime.places import own_nbytes, trimmed

#: Numbers that share a scale and a zero: transformers' default for hqq and quanto, the paper's for KIVI.
GROUP = {"hqq": 64, "quanto": 64, "kivi": 32}
#: Along which axis of the flattened states groups of 64 lie. transformers' guide recommends these two; both put 64
#: neighbouring channels of one token into a group. Its default for hqq, 0, mixes tokens far apart and is much worse.
AXIS = {"hqq": 1, "quanto": 0}
_FP8 = torch.float8_e4m3fn


class PeerCache(Cache):
    """A Cache that stores in `stored` dtype whatever dtype the model runs in, as the checkpoint's own would."""

    def __init__(self, layers: list[Any], stored: torch.dtype) -> None:
        super().__init__(layers=layers)
        self.stored = stored

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = key_states.to(self.stored), value_states.to(self.stored)
        keys, values = super().update(*new, layer_idx, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def nbytes(self) -> int:
        """Bytes of all storages that the cache holds, each counted once; a model's own windows hold no token more."""
        own = [layer for layer in self.layers if layer.is_sliding]
        for layer in own:
            trimmed(layer)
        ours = _tensors([layer for layer in self.layers if not layer.is_sliding])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ours}
        return sum(storages.values()) + sum(own_nbytes(layer) for layer in own)


def _tensors(holder: Any) -> Iterator[Tensor]:
    """Yield every plain tensor in lists, dictionaries, cache layers and tensor subclasses such as quanto's."""
    if hasattr(holder, "__tensor_flatten__"):
        names, _ = holder.__tensor_flatten__()
        yield from _tensors([getattr(holder, name) for name in names])
    elif isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, (list, tuple)):
        for item in holder:
            yield from _tensors(item)
    elif isinstance(holder, dict):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, DynamicLayer):
        yield from _tensors(vars(holder))


def hqq_layer(bits: int, residual: int) -> Any:
    """Return transformers' HQQ layer. Raises OptionError without hqq."""
    return _quantized(quantised_layer("hqq"), "hqq", bits, residual)


def quanto_layer(bits: int, residual: int) -> Any:
    """Return transformers' quanto layer, which unpacks in torch: quanto would compile C++ or CUDA on first use."""
    layer = _quantized(quantised_layer("quanto"), "quanto", bits, residual)
    layer._dequantize = _dequantize_quanto
    return layer


def _quantized(layer: type[Any], family: str, bits: int, residual: int) -> Any:
    package = {"hqq": "hqq", "quanto": "optimum.quanto"}[family]
    if not _installed(package):
        raise OptionError(f"cache {family}-{bits}bit needs {package}: pip install 'kvcompress[peers]'.")
    axis = AXIS[family]
    return layer(
        nbits=bits, axis_key=axis, axis_value=axis, q_group_size=GROUP[family], residual_length=max(1, residual)
    )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _dequantize_quanto(quantized: Any) -> Tensor:
    """Return scale * code - shift, as QBitsTensor.dequantize does, in the shape that was quantised."""
    from optimum.quanto.tensor.grouped import ungroup

    packed, bits = quantized._data._data, quantized._data._bits
    codes = torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)])
    values = quantized._scale * codes[: quantized._data.shape[0]] - quantized._shift
    return values if quantized.axis is None else ungroup(values, axis=quantized.axis, orig_shape=quantized.shape)


class QuantisedOnce(DynamicLayer):
    """The quantiser of a transformers layer, used on every token once, when the residual window is full.

    transformers quantises all tokens anew each time, which adds an error each time; this is what its quantisers
    can do at their best, and what a prompt sees that is followed by a short answer.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.old_keys: list[Any] = []
        self.old_values: list[Any] = []
        self.n_old = 0

    def get_seq_length(self) -> int:
        return self.n_old + super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.layer.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys = torch.cat([*map(self.layer._dequantize, self.old_keys), self.keys], dim=-2)
        values = torch.cat([*map(self.layer._dequantize, self.old_values), self.values], dim=-2)
        if self.keys.shape[2] >= self.layer.residual_length:
            self.old_keys.append(self.layer._quantize(self.keys.contiguous(), axis=self.layer.axis_key))
            self.old_values.append(self.layer._quantize(self.values.contiguous(), axis=self.layer.axis_value))
            self.n_old += self.keys.shape[2]
            self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        return keys, values


@contextmanager
def without_emptying() -> Iterator[None]:
    """Within the block torch.cuda.empty_cache does nothing: hqq calls it twice for every tensor it quantises."""
    with patch("torch.cuda.empty_cache"):
        yield


class Fp8Layer(DynamicLayer):
    """e4m3 numbers: with one float32 scale a tensor, as transformers stores them, or none, as engines do by default.

    The scale is that of the first update's largest number, so the first update should be a whole text (a prompt):
    then no later number is clipped. Every query sees every token in fp8, itself included.
    """

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled
        self.scales: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].to(_FP8), value_states[:, :, :0].to(_FP8)
        if self.scaled:
            self.scales = [_fp8_scale(key_states), _fp8_scale(value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        largest = torch.finfo(_FP8).max
        parts = []
        for i, (old, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            scale = self.scales[i] if self.scaled else 1.0
            stored = (new.float() / scale).clamp(-largest, largest).to(_FP8)
            parts.append((torch.cat([old, stored], dim=-2), scale))
        (self.keys, key_scale), (self.values, value_scale) = parts
        return (self.keys.float() * key_scale).to(self.dtype), (self.values.float() * value_scale).to(self.dtype)


def _fp8_scale(x: Tensor) -> Tensor:
    return (x.abs().amax().float() / torch.finfo(_FP8).max).clamp(min=torch.finfo(torch.float32).tiny)


class KiviLayer(DynamicLayer):
    """After KIVI (arXiv 2402.02750): keys quantised per channel over 32 tokens, values per token over 32 channels.

    Each group of 32 has a 16-bit scale and a 16-bit minimum; codes are packed into bytes. Tokens leave the exact
    window 32 at a time. Departs from the paper in KIVI's favour: `residual` to residual + 31 tokens stay exact for
    keys and values, where the paper keeps 0 to residual - 1 keys.
    """

    def __init__(self, bits: int, residual: int) -> None:
        super().__init__()
        self.bits, self.residual = bits, residual
        self.old_keys: list[tuple[Tensor, Tensor, Tensor]] = []
        self.old_values: list[tuple[Tensor, Tensor, Tensor]] = []
        self.n_old = 0

    def get_seq_length(self) -> int:
        return self.n_old + super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self._decoded(self.old_keys, self.keys), self._decoded(self.old_values, self.values)
        self._evict()
        return keys, values

    def _evict(self) -> None:
        size = GROUP["kivi"]
        n_leaving = max(0, self.keys.shape[2] - self.residual) // size * size
        if n_leaving == 0:
            return
        keys = by_token(self.keys[:, :, :n_leaving]).unflatten(1, (-1, size))  # [batch, groups, 32, numbers]
        values = by_token(self.values[:, :, :n_leaving]).unflatten(2, (-1, size))  # [batch, tokens, groups, 32]
        self.old_keys.append(_quantise(keys, 2, self.bits))
        self.old_values.append(_quantise(values, 3, self.bits))
        self.n_old += n_leaving
        self.keys, self.values = self.keys[:, :, n_leaving:].clone(), self.values[:, :, n_leaving:].clone()

    def _decoded(self, old: list[tuple[Tensor, Tensor, Tensor]], exact: Tensor) -> Tensor:
        """Return all tokens [batch, heads, n_tokens, head_dim]: the old ones decoded, then the exact ones."""
        _, heads, _, head_dim = exact.shape
        parts = [_dequantise(*stored, self.bits) for stored in old]
        # keys' [batch, groups, 32, numbers] and values' [batch, tokens, groups, 32] flatten to the same order
        flat = [p.reshape(p.shape[0], -1, heads, head_dim).transpose(1, 2).to(exact.dtype) for p in parts]
        return torch.cat([*flat, exact], dim=2)


def by_token(x: Tensor) -> Tensor:
    """[batch, heads, n_tokens, head_dim] -> [batch, n_tokens, heads * head_dim]."""
    return x.transpose(1, 2).flatten(2)


def _quantise(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes (bytes), scales and minima (float16) of groups along `dim`."""
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    low = low.half()
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    shifts = bits * torch.arange(8 // bits, device=x.device, dtype=torch.uint8)
    packed = (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)
    return packed, scale, low


def _dequantise(packed: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    shifts = bits * torch.arange(8 // bits, device=packed.device, dtype=torch.uint8)
    codes = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    return codes * scale.float() + low.float()
