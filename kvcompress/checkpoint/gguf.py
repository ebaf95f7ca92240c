"""GGUF in: transformers dequantises the file, and the result is an ordinary checkpoint directory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcompress.errors import CheckpointError


@contextmanager
def converted_gguf(file: Path) -> Iterator[Path]:
    """Yield a temporary bf16 checkpoint directory made from a GGUF file; it is removed on exit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="kvcompress-gguf-") as scratch:
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except ImportError as error:
            raise CheckpointError(f"reading {file.name} needs the package gguf: pip install gguf.") from error
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot read {file.name}: {str(error).splitlines()[0]}") from error
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        config_file = Path(scratch) / "config.json"
        config = json.loads(config_file.read_text())
        config.pop("quantization_config", None)  # the weights written here are no longer quantised
        config_file.write_text(json.dumps(config, indent=2))
        yield Path(scratch)
