"""The transformers model of a checkpoint directory: sizes checked before it is built, every weight from a file.

transformers builds whatever config.json says, fills what the files lack with random numbers, and takes pickles where
there is nothing else. None of that happens here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.headers import check_sizes
from kvcompress.errors import CheckpointError, KVCompressError


def load_weights(source: str | Path, *, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """Return the causal language model of a checkpoint directory, or of a hub id, ready to run.

    dtype: a torch dtype or its name, or "auto". Quantised weights stay as they are, on the device where their library
    can run them. Raises CheckpointError where a weight is missing, has another shape than config.json
    says, or anything else stands in transformers' way.
    """
    import torch
    from transformers import AutoConfig

    given = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if Path(source).is_dir():
        check_sizes(Path(source))
    with explained_loading(source):
        model, info = auto_class(AutoConfig.from_pretrained(source)).from_pretrained(
            source, dtype=given, use_safetensors=True, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of its weights, {missing[0]} first. Check config.json and the files."
        )
    return (model if model.device.type == torch.device(device).type else model.to(device)).eval()


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes a model of a configuration: of text, or of images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_text = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


@contextmanager
def explained_loading(source: str | Path) -> Iterator[None]:
    """Turn whatever transformers raises over a stranger's files into one clear CheckpointError."""
    try:
        yield
    except KVCompressError:
        raise
    except Exception as error:  # of any kind: a configuration's fields reach every part of a model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
        raise CheckpointError(f"transformers cannot load {source}: {reason}.") from error
