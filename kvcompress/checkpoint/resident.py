"""A model whose layers are read from disk when they run: embeddings, norms and head stay, a layer comes and goes.

Two layers are in memory at most, the one that runs and the one that is being read. Weights are what the files hold,
under the names that modules have, or experts one by one that a module holds in one piece; anything else that
transformers would convert on loading is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.checkpoint.loading import explained_loading
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.reading import ParallelReader
from kvcompress.errors import CheckpointError, OptionError
from kvcompress.model.model_spec import ModelSpec

#: What parts of an expert are called in files: gate, up (which modules hold as one, gate_up_proj) and down.
_EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter of a layer: its name there, and the tensors of files that it is made of, one below the other."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]


@dataclass
class Reading:
    """How reads went: bytes, seconds that they took, and seconds for which the model waited for them."""

    n_bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class _Slot:
    """Memory for one layer's weights."""

    buffer: Tensor
    coming: tuple[int, Future[dict[str, Tensor]]] | None = field(default=None)


class StreamedModel:
    """`model`, on the device but for its layers, whose parameters are on the meta device until they are `resident`."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self._dtype, self.device = checkpoint, dtype, device
        self.model = _empty_model(checkpoint, dtype)
        self.layers = _layer_list(self.model)
        self.reading, self.in_tuple = Reading(), False  # whether layers return their hidden states in a tuple
        self.spec: ModelSpec | None = None  # as it was proven, with the model's signature
        self.signature: tuple[float, ...] = ()
        names = {id(module): name for name, module in self.model.named_modules()}
        self._prefixes = [f"{names[id(layer)]}." for layer in self.layers]
        self._weights = [self._weights_of(p, layer) for p, layer in zip(self._prefixes, self.layers, strict=True)]
        self._reader = ParallelReader(checkpoint, device)
        self._ahead = ThreadPoolExecutor(1, "kvcompress-ahead")
        self._place_the_rest()
        size = max(sum(_aligned(self._nbytes(w)) for w in weights) for weights in self._weights)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]

    @property
    def layer_bytes(self) -> int:
        """Bytes of files that are read for all layers once."""
        every = {source for weights in self._weights for weight in weights for source in weight.sources}
        return sum(self.checkpoint.tensors[source].nbytes for source in every)

    def in_order(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) with the layer's weights in place; the next one is read meanwhile."""
        for place, index in enumerate(order):
            self._come(index, order[place + 1] if place + 1 < len(order) else None)
            try:
                yield index, self.layers[index]
            finally:
                self._go(index)

    @contextmanager
    def all_in_turn(self) -> Iterator[None]:
        """Within the block, each layer is read when it is called and gone when it returns: for a few tokens."""
        handles = []
        for index, layer in enumerate(self.layers):

            def come(_module: nn.Module, *_: Any, index: int = index) -> None:
                self._come(index, (index + 1) % len(self.layers))

            def go(_module: nn.Module, _args: Any, output: Any, index: int = index) -> None:
                self.in_tuple = isinstance(output, tuple)
                self._go(index)

            handles.append(layer.register_forward_pre_hook(come))
            handles.append(layer.register_forward_hook(go))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _come(self, index: int, following: int | None) -> None:
        """Put a layer's weights in place, and begin to read the one that follows."""
        started = time.monotonic()
        slot = next((s for s in self._slots if s.coming and s.coming[0] == index), None)
        if slot is None:  # what another order had begun to read is of no use
            slot = self._slots[0]
            self._read_ahead(slot, index)
        assert slot.coming is not None
        tensors = slot.coming[1].result()
        self.reading.waited += time.monotonic() - started
        slot.coming = None
        _place(self.layers[index], tensors)
        if following is not None and following != index:
            self._read_ahead(next(s for s in self._slots if s is not slot), following)

    def _go(self, index: int) -> None:
        """Take a layer's weights away, when everything that was begun with them is done."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        _empty(self.layers[index])

    def _read_ahead(self, slot: _Slot, index: int) -> None:
        for other in self._slots:
            if other.coming and other.coming[0] != index:
                other.coming[1].result()  # one at a time: a slot is not written twice at once
        slot.coming = index, self._ahead.submit(self._read, slot.buffer, index)

    def _read(self, buffer: Tensor, index: int) -> dict[str, Tensor]:
        """Read a layer into a slot and return its parameters there, by their names in the layer."""
        started, offset, found = time.monotonic(), 0, dict[str, Tensor]()
        copies: list[tuple[Tensor, str]] = []
        for weight in self._weights[index]:
            dtype = self._dtype_of(weight)
            n_bytes = self._nbytes(weight)
            whole = buffer[offset : offset + n_bytes].view(dtype)
            offset += _aligned(n_bytes)
            found[weight.name] = whole.view(weight.shape)
            copies += zip(whole.split([self._n_numbers(s) for s in weight.sources]), weight.sources, strict=True)
        self.reading.n_bytes += self._reader.read(copies)
        self.reading.seconds += time.monotonic() - started
        return found

    def _place_the_rest(self) -> None:
        """Read what is in no layer: embeddings, norms, the head; and move buffers."""
        inside = {source for weights in self._weights for weight in weights for source in weight.sources}
        outside = [n for n in self.checkpoint.tensors if n not in inside and not n.startswith(tuple(self._prefixes))]
        tensors, copies = dict[str, Tensor](), list[tuple[Tensor, str]]()
        for name in outside:
            entry = self.checkpoint.tensors[name]
            tensors[name] = torch.empty(entry.shape, dtype=self._dtype, device=self.device)
            copies.append((tensors[name].flatten(), name))
        self.reading.n_bytes += self._reader.read(copies)
        _place(self.model, tensors)
        self.model.tie_weights()
        for owner in self.model.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(self.device))
        missing = [n for n, p in self.model.named_parameters() if p.is_meta and not n.startswith(tuple(self._prefixes))]
        if missing:
            raise CheckpointError(f"{self.checkpoint.source} lacks {missing[0]}. Check config.json and the files.")

    def _weights_of(self, prefix: str, layer: nn.Module) -> list[_Weight]:
        """Return a layer's parameters and where they come from. Raises OptionError where that is not known."""
        here = [n for n in self.checkpoint.tensors if n.startswith(prefix)]
        found, used = [], set[str]()
        for name, tensor in layer.state_dict().items():
            sources = [n for n in _names(prefix, name) if n in self.checkpoint.tensors][:1]
            sources = sources or _experts(prefix, name, here)
            if not self._fit(sources, tuple(tensor.shape)):
                raise self._converted(prefix + name)
            found.append(_Weight(name, tuple(tensor.shape), tuple(sources)))
            used.update(sources)
        if left := sorted(set(here) - used):
            raise self._converted(left[0])
        return found

    def _fit(self, sources: Sequence[str], shape: tuple[int, ...]) -> bool:
        """Return whether tensors, one below the other, are a parameter of a shape."""
        shapes = [self.checkpoint.tensors[s].shape for s in sources]
        if len(sources) == 1:
            return shapes == [shape]
        n_rows = sum(s[0] for s in shapes)
        return (
            bool(sources)
            and len(shape) == 3
            and n_rows == shape[0] * shape[1]
            and {s[1:] for s in shapes} == {shape[2:]}
        )

    def _converted(self, name: str) -> OptionError:
        return OptionError(
            f"{self.checkpoint.source} cannot be streamed: its files and its modules differ in {name} "
            "(transformers converts them on loading). Leave out --memory."
        )

    def _n_numbers(self, source: str) -> int:
        return self.checkpoint.tensors[source].n_numbers

    def _dtype_of(self, weight: _Weight) -> torch.dtype:
        return self._reader.dtype_of(weight.sources[0], self._dtype)

    def _nbytes(self, weight: _Weight) -> int:
        return sum(self._n_numbers(s) for s in weight.sources) * self._dtype_of(weight).itemsize


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _names(prefix: str, name: str) -> list[str]:
    """Return what files may call a layer's parameter; Mixtral's have another name for its block of experts."""
    return [prefix + name, prefix + name.replace("mlp.", "block_sparse_moe.", 1)]


def _experts(prefix: str, name: str, here: Sequence[str]) -> list[str]:
    """Return the tensors of files that a module holds as one, all experts' gate and up, or all experts' down; or []."""
    if not (match := re.fullmatch(r"(.*)experts\.(gate_up_proj|down_proj)", name)):
        return []
    for gate, up, down in _EXPERT_PARTS:
        wanted = (gate, up) if match[2] == "gate_up_proj" else (down,)
        pattern = re.compile(rf"{re.escape(prefix)}[a-z_]+\.experts\.(\d+)\.({'|'.join(wanted)})\.weight")
        found = [(int(m[1]), wanted.index(m[2]), n) for n in here if (m := pattern.fullmatch(n))]
        if found:
            return [n for _, _, n in sorted(found)]
    return []


def _place(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(tensors, strict=False, assign=True)
    module.requires_grad_(False)


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the model with its parameters on the meta device and its buffers as they are computed."""
    from transformers import AutoModelForCausalLM

    from kvcompress.compat import configuration

    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise OptionError("--memory needs the package accelerate: pip install accelerate.") from error
    with explained_loading(checkpoint.path):
        config = configuration(checkpoint.path)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def _layer_list(model: Any) -> nn.ModuleList:
    from kvcompress import compat

    n_layers = compat.text_config(model).num_hidden_layers
    lists = [m for m in compat.decoder_of(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise OptionError("this model keeps its layers in no list, so they cannot be streamed. Leave out --memory.")
    return lists[0]


def _empty(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
