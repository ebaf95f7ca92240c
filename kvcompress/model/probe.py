"""A loaded model -> ModelSpec, by running it: what reaches the cache, in which sizes, and how keys turn with position.

A *site* is defined where an attention module hands keys and values to its cache, so no weight name, norm, fused
projection or router needs to be known. The rotation is proven, not read: a text of one token attends to itself alone,
so its hidden states are the same wherever it stands, and its keys at two positions differ by the rotation and by
nothing else. Where keys do not turn (no RoPE, ALiBi, learned positions), there is nothing to undo.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.errors import AttachmentError, UnsupportedModelError
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, OwnLayer, Site
from kvcompress.model.positions import (
    Attended,
    forward,
    keys_at_positions,
    positions_of,
    takes_positions,
    tokens_of,
)
from kvcompress.model.proof import FrequencyTable, Keys, is_turned_by, prove_rotation
from kvcompress.model.recording import Recorded

#: Tokens of the text that sizes and readers are taken from.
_LENGTH = 8


class NotRun(UnsupportedModelError):
    """A model did not run: on the meta device it may need numbers, elsewhere it wants another cache."""


def probe(model: Any, *, prove: bool = True, at_once: bool = False) -> ModelSpec:
    """Return what a transformers model caches. On the meta device nothing can be proven: then prove is False.

    at_once: in as few forwards as it can be done, for a model whose weights are read for each.

    Layers that never call `update` (linear attention, Mamba, layers that read another one's cache) have no site;
    those with a sliding window or a state of their own keep transformers' own cache layer. Raises
    UnsupportedModelError with the reason where nothing grows with the text, or where keys turn in an unknown way.
    """
    config = compat.text_config(model)
    try:
        run = forward(model, tokens_of(model, (1, _LENGTH)))
        repeated = sorted(run.repeated)
        n_more = 1 if at_once else _step(model, run)  # the reader of its configuration has seen that
    except AttachmentError as error:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported: its forward takes no cache of keys and values, so "
            "there is nothing to compress."
        ) from error
    except Exception as error:  # whatever a model does that cannot be run like this
        raise NotRun(
            f"model type '{config.model_type}' is not supported: it does not run with a cache as transformers makes it "
            f"({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]})"
        ) from error
    if repeated:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported: it hands keys and values of layer {repeated[0]} to "
            "its cache more than once for a token, as where layers run in loops, each with a cache of its own."
        )
    _check_tokens(config, run, n_more)
    layers, own = _layers(config, run)
    spec = ModelSpec(
        architecture=config.model_type,
        dtype=str(run.dtype).removeprefix("torch."),
        hidden_size=int(getattr(config, "hidden_size", 0)),
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        layers=tuple(layers),
        tied_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
        own_layers=tuple(own),
        probed=True,
        attending=tuple(run.attending),
    )
    return proven(model, spec, at_once=at_once) if prove else spec


def _check_tokens(config: Any, run: Recorded, n_more: int) -> None:
    """Raise UnsupportedModelError unless a text's tokens are cached as they come. n_more: of one token more."""
    handed = {u.key.shape[2] for u in run.updates.values()} | {_LENGTH}
    if handed != {_LENGTH}:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported: of a text of {_LENGTH} tokens it caches "
            f"{max(handed)}, so which position a cached one has is not known."
        )
    if n_more != 1:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported: given one token more, it caches {n_more}. It reads "
            "the whole text at every step."
        )


def _layers(config: Any, run: Recorded) -> tuple[list[AttentionSpec], list[OwnLayer]]:
    """Return the layers that are compressed, and the others."""
    layers, own = [], []
    for index, layer in enumerate(run.cache_layers):
        seen = run.updates.get(index)
        if seen is None or not layer.grows:
            numbers = 0 if seen is None else seen.numbers
            own.append(OwnLayer(index, layer.kind, layer.window, numbers, layer.state_bytes))
        if seen is not None and layer.grows:
            layers.append(_attention(index, run))
            if layer.state_bytes:  # beside its keys and values
                own.append(OwnLayer(index, layer.kind, state_bytes=layer.state_bytes))
    plain = all(x.keeps_only_tokens for x in run.cache_layers)
    if not layers and plain and any(o.window for o in own):  # nothing but windows: then they are what is compressed
        windows = {o.window for o in own if o.window}
        if len(windows) > 1:
            raise UnsupportedModelError(
                f"model type '{config.model_type}' is not supported: each layer keeps a window, of {min(windows)} to "
                f"{max(windows)} tokens. Windows are compressed where all are the same."
            )
        layers = [replace(_attention(o.layer, run), sliding_window=o.window) for o in own if o.window]
        own = [o for o in own if not o.window]
    if not layers:
        kinds = ", ".join(sorted({o.kind for o in own})) or "none"
        beside = " An indexer's keys choose which tokens are read." if "Indexed" in kinds else ""
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported: no layer hands keys and values, and nothing else, to "
            f"a cache that grows with the text, so there is nothing to compress (its cache layers: {kinds}).{beside}"
        )
    return layers, own


def proven(model: Any, spec: ModelSpec, *, at_once: bool = False) -> ModelSpec:
    """Return the spec with the rotation of every layer as the loaded model turns its keys.

    Raises UnsupportedModelError where keys turn with the position and no rotation explains it: then they depend on the
    length of the text as well (dynamic or longrope scaling), or on something that this version does not know.
    """
    tables = frequency_tables(model)

    def found(*, alike: bool) -> ModelSpec:
        keys = keys_at_positions(model, at_once=at_once, alike=alike)
        rotations = {site: prove_rotation(keys, site.layer, site.part, candidates=tables) for site in spec.sites}
        return spec.turned({site: rotation for site, rotation in rotations.items() if rotation is not None})

    try:
        return found(alike=False)
    except UnsupportedModelError as error:
        try:
            return found(alike=True)
        except UnsupportedModelError:
            raise error from None


def turned_otherwise(model: Any, spec: ModelSpec) -> Site | None:
    """Return a site whose numbers a loaded model does not turn as the spec says, seen at one position, or None."""
    if not takes_positions(model):
        return next(iter(spec.rotations), None)
    ids, position, attended = tokens_of(model, (4, 1)), positions_of(model)[-2], Attended()
    base = forward(model, ids, position=0, instead=attended.seen).updates
    otherwise = None
    for instead in (None, attended.again()):
        keys = Keys(base, {position: forward(model, ids, position=position, instead=instead).updates})
        sites = (s for s in spec.sites if not is_turned_by(keys, s, spec.attention(s).rotation))
        if (site := next(sites, None)) is None:
            return None
        otherwise = otherwise or site
    return otherwise


def signature(model: Any, spec: ModelSpec) -> tuple[float, ...]:
    """Return some numbers by which a model and its relatives (quantised, fine-tuned) are known: of length 1.

    They are values of eight texts of one token each in the middle layer with sites.
    """
    given = 0 if takes_positions(model) else None
    updates = forward(model, tokens_of(model, (8, 1)), position=given).updates
    values = updates[spec.layers[len(spec.layers) // 2].layer].value.detach().flatten(1).double().cpu()
    chosen = values[:, torch.linspace(0, values.shape[1] - 1, 8).long()].flatten()
    return tuple(round(x, 5) for x in (chosen / chosen.norm().clamp_min(1e-12)).tolist())


def few_logits(model: Any) -> Tensor:
    """Return the logits of a few tokens, with the cache that the model takes by itself: [1, n_tokens, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens_of(model, (1, _LENGTH)), use_cache=True).logits
    return logits.float()


def likeness(model: Any, spec: ModelSpec, known: tuple[float, ...]) -> float:
    """Return how alike a model and the one of a signature are: 1 where they are the same, about 0 for strangers."""
    return sum(a * b for a, b in zip(signature(model, spec), known, strict=True))


def matched(found: ModelSpec, expected: ModelSpec) -> ModelSpec:
    """Return `found` where its sites are the expected ones. Raises UnsupportedModelError with the first that is not."""
    sizes = [
        {site: (spec.attention(site).n_kv_heads, spec.attention(site).head_dim) for site in spec.sites}
        for spec in (found, expected)
    ]
    for site in sorted({**sizes[0], **sizes[1]}):
        if sizes[0].get(site) != sizes[1].get(site):
            raise UnsupportedModelError(
                f"{site}: config.json says (KV heads, numbers each) {sizes[1].get(site)}, the running model caches "
                f"{sizes[0].get(site)}. Check config.json against the weights."
            )
    return found


def frequency_tables(model: Any) -> list[FrequencyTable]:
    """Return every list of RoPE frequencies that the model keeps as a buffer, of whatever name and place."""
    found: list[FrequencyTable] = []
    for path, buffer in model.named_buffers():
        owner, _, name = path.rpartition(".")
        if not name.endswith("inv_freq") or buffer.dim() != 1 or buffer.is_meta:
            continue
        scale = getattr(model.get_submodule(owner), name.replace("inv_freq", "attention_scaling"), 1.0)
        table = FrequencyTable(buffer.detach().cpu().float(), float(scale))
        if not any(f.scale == table.scale and torch.equal(f.frequencies, table.frequencies) for f in found):
            found.append(table)
    return found


def _step(model: Any, run: Recorded) -> int:
    """Return how many tokens a model hands to the cache of a run when it is given one token more."""
    seen = dict(run.updates)
    with torch.no_grad():
        model(input_ids=tokens_of(model, (1, 1)), use_cache=True, **compat.cache_argument(model, run.cache))
    n_more = max((u.key.shape[2] for u in run.updates.values()), default=1)
    run.updates.update(seen)
    return n_more


def _attention(index: int, run: Recorded) -> AttentionSpec:
    """Return a layer's sizes as they came to the cache; its rotation is still to be proven."""
    seen = run.updates[index]
    _, n_heads, _, head_dim = seen.key.shape
    _, value_heads, _, value_dim = seen.value.shape
    readers = tuple(r for r in run.readers if r.layer == index)
    key = AttentionSpec(
        layer=index,
        n_heads=readers[0].n_heads if readers else n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        rotary_dim=0,
        readers=tuple(r.module for r in readers) if all(r.is_plain for r in readers) else (),
    )
    same = (n_heads, head_dim) == (value_heads, value_dim)
    return key if same else replace(key, values=replace(key, n_kv_heads=value_heads, head_dim=value_dim))
