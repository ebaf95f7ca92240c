"""What a checkpoint directory says of itself: config.json, the safetensors index and headers, compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from kvcompress.documents import DocumentError, is_file_name, read_json, shaped
from kvcompress.errors import CheckpointError

_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
#: Fields of config.json by which transformers builds layers, and by which it allocates.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_SIZES: tuple[str, ...] = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim")
_SIZES += (
    "d_model",
    "n_embd",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
#: Tokenizers of 262,144 words have 33 MB.
_MOST_JSON_BYTES = 128 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class _Index(TypedDict):
    weight_map: dict[str, str]


class TensorEntry(NamedTuple):
    """Where a tensor lies, from the file's header alone."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.n_numbers * _DTYPE_BYTES.get(self.dtype, 1)


class _Kinds(TypedDict):
    """What early releases of transformers build a model of, whatever it is."""

    layer_types: NotRequired[list[str] | None]
    rms_norm_eps: NotRequired[float | None]
    layer_norm_eps: NotRequired[float | None]


def read_config(directory: Path) -> dict[str, Any]:
    """Return the parsed config.json of a directory."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face checkpoint directory.")
    try:
        config: dict[str, Any] = read_json(file, finite=False)
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{file} is not valid ({error}). Download or save the checkpoint again.") from error
    return config


def check_sizes(directory: Path) -> None:
    """Raise CheckpointError where config.json asks for more layers than there are tensors, or wider ones than any is.

    A model is built by these numbers, so they are compared with the files first. Weights that are packed are up to
    eight times wider than their tensors.
    """
    check_json_files(directory)
    check_widths(read_config(directory), read_headers(directory))


def check_json_files(directory: Path) -> None:
    """Raise CheckpointError for a JSON file beyond any size, before transformers reads it whole."""
    for file in directory.glob("*.json"):
        if file.is_file() and (size := file.stat().st_size) > _MOST_JSON_BYTES:
            raise CheckpointError(f"{file} has {size:,} bytes, more than the {_MOST_JSON_BYTES:,} that are read.")


def check_widths(config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Raise CheckpointError as `check_sizes` does, for a configuration and headers that were read."""
    widest = 8 * max((n for entry in tensors.values() for n in entry.shape), default=0)
    inner = [value for value in config.values() if isinstance(value, dict)]  # text_config and the like
    for fields in (config, *inner):
        try:
            shaped(fields, _Kinds, "config.json")
        except DocumentError as error:
            raise CheckpointError(f"{error}. Check the file.") from error
        for name, value in fields.items():
            most = len(tensors) if name in _LAYER_COUNTS else widest if name in _SIZES else None
            if most is not None and isinstance(value, int) and not 0 <= value <= most:
                raise CheckpointError(
                    f"config.json: {name} is {value:,}, and the weights have {len(tensors)} tensors, "
                    f"{widest // 8:,} wide at most. Check the file."
                )


def read_headers(path: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a directory's weights by its name. Raises CheckpointError for files that do not fit."""
    tensors: dict[str, TensorEntry] = {}
    for file, names in _weight_files(path).items():
        found = _read_header(path, file)
        missing = sorted(set(names) - set(found))
        if missing:
            raise CheckpointError(f"{file} lacks tensor {missing[0]}, which the index promises. Download it again.")
        tensors.update(found)
    return tensors


def _weight_files(path: Path) -> dict[str, list[str]]:
    """Return {file: tensor names that the index promises for it}; no names for a single file without index."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if (path / "model.safetensors").is_file():
            return {"model.safetensors": []}
        if any(f.suffix in _PICKLES for f in path.iterdir()):
            raise CheckpointError(
                f"{path} holds only pickled weights, which can run code when opened. "
                "Load it with transformers and save_pretrained(safe_serialization=True) first."
            )
        raise CheckpointError(
            f"{path} holds no model.safetensors and no model.safetensors.index.json. Download it again, whole."
        )
    try:
        files: dict[str, list[str]] = {}
        for name, file in read_json(index, _Index)["weight_map"].items():
            files.setdefault(file, []).append(name)
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{index} is not a valid safetensors index ({error}). Download it again.") from error
    for file in files:
        if not is_file_name(file):
            raise CheckpointError(f"{index.name} names '{file}', which lies outside the checkpoint. Refused.")
        if not (path / file).is_file():
            raise CheckpointError(f"{index.name} names {file}, which is missing from {path}. Download it again.")
    return files


def _read_header(path: Path, file: str) -> dict[str, TensorEntry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            return {n: TensorEntry(file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}). Download or save it again.") from error
