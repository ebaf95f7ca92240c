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
from kvcompress.errors import CheckpointError, KVCompressError, UnsupportedModelError

#: Of the free memory of GPUs over which layers are spread; the rest is for what runs.
_WEIGHTS_SHARE = 0.8


def load_weights(source: str | Path, *, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """Return the causal language model of a checkpoint directory, or of a hub id, ready to run.

    dtype: a torch dtype or its name, or "auto". device: several, "cuda:0+cuda:1", for layers spread over them.
    Quantised weights stay as they are, on the device where their library can run them. Raises CheckpointError where a
    weight is missing, has another shape than config.json says, or anything else stands in transformers' way.
    """
    import torch

    from kvcompress.compat import configuration

    given = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if Path(source).is_dir():
        check_sizes(Path(source))
    with explained_loading(source):
        config = configuration(source)
        safe = {"use_safetensors": True, "trust_remote_code": False}
        model, info = auto_class(config).from_pretrained(
            source, dtype=given, output_loading_info=True, **safe, **_placed(config, str(device))
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of its weights, {missing[0]} first. Check config.json and the files."
        )
    if "+" not in str(device) and model.device.type != torch.device(device).type:
        model = model.to(device)
    return model.eval()


def _placed(config: Any, device: str) -> dict[str, Any]:
    """Return how transformers is told to read weights to GPUs, each tensor at once and not by way of this machine."""
    from importlib.util import find_spec

    quantised = any(hasattr(c, "quantization_config") for c in (config, config.get_text_config()))
    if not device.startswith("cuda") or quantised or find_spec("accelerate") is None:
        return {}
    if "+" not in device:
        return {"device_map": {"": device}}
    import torch

    numbers = [int(d.removeprefix("cuda:")) for d in device.split("+")]
    free = {i: int(torch.cuda.mem_get_info(i)[0] * _WEIGHTS_SHARE) for i in numbers}
    return {"device_map": "balanced", "max_memory": free}


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes a model of a configuration: of text, or of images and text.

    Raises UnsupportedModelError where it has neither.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for found in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in found._model_mapping:
            return found
    raise UnsupportedModelError(
        f"model type '{config.model_type}' is not supported: transformers has no decoder of it that writes text after "
        "text, or after images and text."
    )


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
