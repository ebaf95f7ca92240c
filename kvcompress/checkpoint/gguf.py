"""GGUF in: transformers dequantises the file, and the result is an ordinary checkpoint directory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from kvcompress.checkpoint.loading import explained_loading
from kvcompress.errors import CheckpointError


@contextmanager
def converted_gguf(file: Path) -> Iterator[Path]:
    """Yield a temporary bf16 checkpoint directory made from a GGUF file; it is removed on exit.

    Raises CheckpointError for a file that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise CheckpointError(f"reading {file.name} needs the package gguf: pip install 'kvcompress[gguf]'.")
    with tempfile.TemporaryDirectory(prefix="kvcompress-gguf-") as scratch:
        with explained_loading(file):
            own = {"gguf_file": file.name, "trust_remote_code": False}
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **own)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **own)
        # A model read from GGUF counts as quantised and refuses to be saved, so its weights move to a plain one.
        fields = model.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
            fields.pop(name, None)
        plain = AutoModelForCausalLM.from_config(type(model.config)(**fields))
        plain.load_state_dict(model.state_dict(), strict=True)
        plain.tie_weights()
        plain.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        yield Path(scratch)
