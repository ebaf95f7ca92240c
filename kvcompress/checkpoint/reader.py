"""A checkpoint directory, read lazily: headers first, tensors only when asked for, the source never written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint.headers import TensorEntry, check_widths, read_config, read_headers
from kvcompress.checkpoint.running import spec_by_running
from kvcompress.errors import CheckpointError
from kvcompress.model.architectures import is_read, read_model_spec
from kvcompress.model.model_spec import PARTS, ModelSpec, Projection, Site

if TYPE_CHECKING:
    from torch import Tensor

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: On the hub, beside the weights that are loaded: Mistral's own format, and directories of other formats.
_SECOND_COPIES = ["consolidated*", "*/*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. `tensors` comes from the safetensors headers; nothing else is in memory."""

    path: Path
    source: str
    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, TensorEntry]

    @property
    def weight_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows start:stop of a tensor, in its own dtype, reading only those bytes."""
        from safetensors import safe_open

        with safe_open(self.path / self.tensors[name].file, framework="pt") as handle:
            return handle.get_slice(name)[start:stop]

    def site_weight(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Return (weight [n, hidden], bias [n] or None) of a site's projection, float64.

        Raises CheckpointError where a value is NaN or infinite.
        """
        projection = self.spec.attention(site).projection(site.part)
        weight = self.rows(projection.weight, projection.start, projection.stop).double()
        bias = self.rows(projection.bias).double() if projection.bias else None
        for name, tensor in ((projection.weight, weight), (projection.bias, bias)):
            if tensor is not None and not tensor.isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                raise CheckpointError(
                    f"{name} holds {bad} NaN or infinite values. The checkpoint is damaged: download or save it again."
                )
        return weight, bias

    def fingerprint(self) -> str:
        """Return a SHA-256 over the config, the headers and 64 KiB samples of every weight file.

        Samples instead of whole files, so that tens of gigabytes take a second; every file's first and last
        sample is included.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({entry.file for entry in self.tensors.values()}):
            size = (self.path / file).stat().st_size
            digest.update(f"{file}:{size}".encode())
            with (self.path / file).open("rb") as handle:
                for k in range(65):
                    handle.seek(max(0, size - 65536) * k // 64)
                    digest.update(handle.read(65536))
        return digest.hexdigest()


@contextmanager
def open_checkpoint(source: str | Path) -> Iterator[Checkpoint]:
    """Open a local directory, a GGUF file or a hub id as a Checkpoint, checked as far as headers tell.

    A GGUF file is converted by transformers into a temporary directory, removed on exit.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        from kvcompress.checkpoint.gguf import converted_gguf

        with converted_gguf(path) as directory:
            yield _open_directory(directory, str(source))
        return
    yield _open_directory(path if path.is_dir() else _download(str(source)), str(source))


@contextmanager
def open_headers(source: str | Path) -> Iterator[Checkpoint]:
    """Open a checkpoint for looking at its headers only: of a hub id no weights are fetched.

    Raises CheckpointError where they cannot be had, and what open_checkpoint raises.
    """
    if Path(source).exists() or not _is_hub_id(str(source)):
        with open_checkpoint(source) as checkpoint:
            yield checkpoint
        return
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        path = Path(hf_hub_download(str(source), "config.json")).parent
        metadata = get_safetensors_metadata(str(source))
    except Exception as error:
        raise _not_fetched(str(source), error) from error
    tensors = {
        name: TensorEntry(file, tuple(info.shape), info.dtype)
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    }
    config = read_config(path)
    check_widths(config, tensors)
    yield _checked(path, str(source), config, tensors, weights=False)


def open_folded(directory: Path) -> Checkpoint:
    """Return a folded output as a Checkpoint: config.json describes the original, k_proj and v_proj are smaller."""
    config = read_config(directory)
    spec, tensors = read_model_spec(config), read_headers(directory)
    for site in spec.sites:
        name = spec.attention(site).projection(site.part).weight
        if name not in tensors:
            raise CheckpointError(f"tensor {name} is missing from {directory}. Compress again.")
    spec = replace(spec, dtype=_DTYPE_NAMES[tensors[spec.layers[0].projection("key").weight].dtype])
    return Checkpoint(path=directory, source=str(directory), config=config, spec=spec, tensors=tensors)


def _open_directory(path: Path, source: str) -> Checkpoint:
    config = read_config(path)
    if is_read(config):
        read_model_spec(config)  # an unsupported model is refused for that, before its files are looked at
    tensors = read_headers(path)
    check_widths(config, tensors)
    return _checked(path, source, config, tensors)


def _checked(
    path: Path, source: str, config: dict[str, Any], tensors: dict[str, TensorEntry], *, weights: bool = True
) -> Checkpoint:
    """Return the checkpoint, its tensors checked against config.json. weights: whether they are there, too."""
    if not is_read(config):
        spec = spec_by_running(path, config, weights=weights)
        return Checkpoint(path=path, source=source, config=config, spec=spec, tensors=tensors)
    spec = read_model_spec(config)
    _check_projections(spec, tensors)
    # The tensors are what keys and values are computed with; the config only says what they should be.
    spec = replace(spec, dtype=_DTYPE_NAMES[tensors[spec.layers[0].projection("key").weight].dtype])
    return Checkpoint(path=path, source=source, config=config, spec=spec, tensors=tensors)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _download(source: str) -> Path:
    """Return the local snapshot of a hub id, weights as safetensors only."""
    if not _is_hub_id(source):
        raise CheckpointError(f"{source} is neither a directory, a .gguf file nor a hub id (ORG/NAME).")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=_SECOND_COPIES))
    except Exception as error:
        raise _not_fetched(source, error) from error


def _not_fetched(source: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{source} is no local directory and could not be fetched from the hub: {reason}")


def _check_projections(spec: ModelSpec, tensors: dict[str, TensorEntry]) -> None:
    for attention in spec.layers:
        projections = [attention.projection(part) for part in PARTS]
        n_rows: dict[str, int] = {}
        for projection in projections:
            n_rows[projection.weight] = max(n_rows.get(projection.weight, 0), projection.stop)
        for projection in projections:
            _check_projection(projection, (n_rows[projection.weight], spec.hidden_size), tensors)


def _check_projection(projection: Projection, shape: tuple[int, int], tensors: dict[str, TensorEntry]) -> None:
    expected = {projection.weight: shape}
    if projection.bias:
        expected[projection.bias] = shape[:1]  # type: ignore[assignment]
    for name, want in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint. Check config.json and the files.")
        if tensors[name].shape != want:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensors[name].shape)}, expected {list(want)} from config.json "
                "(num_key_value_heads, head_dim, hidden_size). Check the file."
            )
        if tensors[name].dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"tensor {name} has dtype {tensors[name].dtype}; expected F32, F16 or BF16.")
