"""The config class of a DeciLM checkpoint whose layers cache different numbers of heads, for vLLM.

This file is written beside the weights and loaded by transformers' AutoConfig (--trust-remote-code); it needs
nothing but transformers. `block_configs[i].attention.n_heads_in_group` query heads share a cached head in layer i.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A JSON object whose fields are attributes as well, as vLLM reads them."""

    def __init__(self, fields: Any) -> None:
        super().__init__({k: Block(v) if isinstance(v, dict) else v for k, v in fields.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciLMConfig(LlamaConfig):
    """A llama config with `block_configs`, one for each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.block_configs = [Block(b) for b in block_configs or []]
