"""A model whose layers are read from disk when they run: embeddings, norms and head stay, a layer comes and goes.

Two layers are in memory at most, the one that runs and the one that is being read. Weights are what the files hold,
under the names that modules have; where transformers would convert them on loading, it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.checkpoint.loading import explained_loading
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import CheckpointError, OptionError


class StreamedModel:
    """`model`, on the device but for its layers, whose parameters are on the meta device until they are `resident`."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self.device = checkpoint, dtype, device
        self.model = _empty_model(checkpoint, dtype)
        self.layers = _layer_list(self.model)
        names = {id(module): name for name, module in self.model.named_modules()}
        self._prefixes = [f"{names[id(layer)]}." for layer in self.layers]
        self._names = [[n for n in checkpoint.tensors if n.startswith(prefix)] for prefix in self._prefixes]
        self._check_names()
        #: Bytes of weights that were read, and whether layers return their hidden states in a tuple.
        self.bytes_read, self.in_tuple = 0, False
        inside = {name for names in self._names for name in names}
        self._place(self.model, "", {n: self._read(n) for n in checkpoint.tensors if n not in inside})
        self.model.tie_weights()
        for owner in self.model.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(device))
        missing = [n for n, p in self.model.named_parameters() if p.is_meta and not n.startswith(tuple(self._prefixes))]
        if missing:
            raise CheckpointError(f"{checkpoint.source} lacks {missing[0]}. Check config.json and the files.")

    def in_order(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) with the layer's weights in place; the next one is read meanwhile."""
        with ThreadPoolExecutor(1, "kvcompress-read") as reader:
            coming = [reader.submit(self._layer, order[0])] if order else []
            for place, index in enumerate(order):
                tensors = coming.pop().result()
                if place + 1 < len(order):
                    coming.append(reader.submit(self._layer, order[place + 1]))
                with self._resident(index, tensors):
                    yield index, self.layers[index]

    @contextmanager
    def all_in_turn(self) -> Iterator[None]:
        """Within the block, each layer is read when it is called and gone when it returns: for a few tokens."""
        handles = []
        for index, layer in enumerate(self.layers):

            def come(module: nn.Module, *_: Any, index: int = index) -> None:
                self._place(module, self._prefixes[index], self._layer(index))

            handles.append(layer.register_forward_pre_hook(come))
            handles.append(layer.register_forward_hook(self._gone))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gone(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.in_tuple = isinstance(output, tuple)
        _empty(module)

    @contextmanager
    def _resident(self, index: int, tensors: dict[str, Tensor]) -> Iterator[None]:
        self._place(self.layers[index], self._prefixes[index], tensors)
        try:
            yield
        finally:
            _empty(self.layers[index])

    def _layer(self, index: int) -> dict[str, Tensor]:
        return {name: self._read(name) for name in self._names[index]}

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint.rows(name)
        self.bytes_read += tensor.nbytes
        return tensor.to(self.device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    @staticmethod
    def _place(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)

    def _check_names(self) -> None:
        for prefix, names, layer in zip(self._prefixes, self._names, self.layers, strict=True):
            wanted = {prefix + name for name in layer.state_dict()}
            if wanted != set(names):
                name = min(wanted ^ set(names))
                raise OptionError(
                    f"{self._checkpoint.source} cannot be streamed: its files and its modules differ in {name} "
                    "(transformers converts them on loading). Leave out --memory."
                )


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the model with its parameters on the meta device and its buffers as they are computed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise OptionError("--memory needs the package accelerate: pip install accelerate.") from error
    with explained_loading(checkpoint.path):
        config = AutoConfig.from_pretrained(checkpoint.path)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _layer_list(model: Any) -> nn.ModuleList:
    from kvcompress import compat

    n_layers = compat.text_config(model).num_hidden_layers
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise OptionError("this model keeps its layers in no list, so they cannot be streamed. Leave out --memory.")
    return lists[0]


def _empty(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
