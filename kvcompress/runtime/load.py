"""Loading compressed checkpoints: the model, with its compressed cache attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from kvcompress import compat
from kvcompress.checkpoint.headers import check_sizes
from kvcompress.checkpoint.loading import explained_loading, load_weights
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.compat import PreTrainedModel
from kvcompress.errors import CheckpointError
from kvcompress.model.architectures import read_model_spec
from kvcompress.model.model_spec import ModelSpec, Site
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attach_plan
from kvcompress.runtime.head_norm import HEAD_NORM, add_head_norm
from kvcompress.runtime.layers import check_fit
from kvcompress.runtime.output import read_output


def load(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Return a transformers model whose `generate` uses the compressed cache of `directory` by itself.

    base: the original checkpoint, for an output that holds only maps; the recorded source by default. dtype: to run in,
    a torch dtype or its name; "auto" is the checkpoint's own. device: where the model is put.
    Raises CheckpointError if files are missing, damaged, or belong to another model.
    """
    directory = Path(directory)
    plan, maps = read_output(directory)
    if plan.form == "folded":
        model = _load_folded(directory, plan, maps, dtype)
    else:
        weights = str(directory if (directory / "config.json").is_file() else base or plan.source)
        if Path(weights).is_absolute() and not Path(weights).is_dir():
            raise CheckpointError(
                f"{directory} holds only maps, and their source {weights} is not here. Name the original with --base."
            )
        model = load_weights(weights, dtype=dtype)
    return attach_plan(model.to(device).eval(), plan, maps)


def _load_folded(directory: Path, plan: Plan, maps: dict[Site, SiteMaps], dtype: torch.dtype | str) -> PreTrainedModel:
    """Return the model with its smaller k_proj and v_proj in place."""
    from safetensors.torch import load_file

    check_sizes(directory)
    with explained_loading(directory):
        config = compat.configuration(directory)
    name = plan.dtype if dtype == "auto" else dtype
    wanted = getattr(torch, name) if isinstance(name, str) else name
    with explained_loading(directory):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    spec = read_model_spec(config.to_dict())
    check_fit(spec, plan)
    for site in maps:
        projection = spec.layers[site.layer].projection(site.part)
        parent, _, name = projection.module.rpartition(".")
        full: Any = model.get_submodule(projection.module)
        rank = maps[site].encoder.shape[0]
        folded = _empty_linear(full.in_features, rank, bias=full.bias is not None, dtype=wanted)
        setattr(model.get_submodule(parent), name, folded)
    state: dict[str, Any] = {}
    try:
        for file in sorted(directory.glob("model*.safetensors")):
            state.update(load_file(file))
        _add_head_norms(model, spec, state)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: the folded weights are damaged ({str(error).splitlines()[0]}).") from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        name = next(iter([*unexpected, *(set(missing) - tied)]))
        raise CheckpointError(f"{directory}: tensor {name} does not fit the folded model. Compress again.")
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        with explained_loading(directory):
            model.generation_config = compat.GenerationConfig.from_pretrained(directory)
    return model


def _add_head_norms(model: PreTrainedModel, spec: ModelSpec, state: dict[str, Any]) -> None:
    """Add the norms of head outputs that a healed checkpoint has weights of."""
    for attention in spec.layers:
        path = attention.projection("value").module.rpartition(".")[0]
        if f"{path}.{HEAD_NORM}.weight" in state:
            add_head_norm(model.get_submodule(path), n_heads=attention.n_heads, head_dim=attention.head_dim)


def _empty_linear(n_in: int, n_out: int, *, bias: bool, dtype: torch.dtype) -> nn.Linear:
    """Return a Linear whose weights are still to come; nn.Linear's own initialisation warns where n_out is 0."""
    linear = nn.Linear(1, 1, bias=bias)
    linear.in_features, linear.out_features = n_in, n_out
    linear.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype))
    if bias:
        linear.bias = nn.Parameter(torch.empty(n_out, dtype=dtype))
    return linear
