"""`kvcompress inspect`: what a checkpoint's headers say about its cache, and which forms are possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.checkpoint.reader import Checkpoint
    from kvcompress.model.model_spec import AttentionSpec, ModelSpec, OwnLayer

_KEY_NORM = "keys are normalised per head, so they are not linear in the hidden state"
_ONE_HEAD = "one KV head: there are no heads to mix"
_NO_WEIGHTS = "which weights make keys and values is not known of this model family, or they are quantised"
#: The share of the growing cache at which sizes of a compressed one are stated.
_KEEP = 0.125


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a .gguf file or a hub id.")],
    json: flags.Json = False,
) -> None:
    """Show a model's layers, heads and cache bytes, and which compressed forms are possible and why not.

    Of a safetensors directory only the headers are read, so it takes no time and no memory.
    """
    from kvcompress.checkpoint.reader import open_headers

    with open_headers(model) as checkpoint:
        document = describe(checkpoint)
    if json:
        terminal.print_json(document)
    else:
        _print(document)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what --json prints. An obstacle of None means possible."""
    from kvcompress.checkpoint.map_budget import default_group
    from kvcompress.options import CompressOptions
    from kvcompress.report.document import CONTEXTS

    spec = checkpoint.spec
    first, per_token = spec.layers[0], spec.cache_bytes_per_token
    group = default_group(checkpoint, CompressOptions().keep)
    return {
        "source": checkpoint.source,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "layers": len({a.layer for a in spec.layers} | {o.layer for o in spec.own_layers}),
        "query_heads": None if spec.probed and not first.readers else first.n_heads,
        "kv_heads": first.n_kv_heads,
        "head_dim": first.head_dim,
        "rotary_dim": None if spec.probed else max(a.rotary_dim for a in spec.layers),
        "layers_without_rope": [] if spec.probed else [a.layer for a in spec.layers if not a.rotary_dim],
        "layers_with_sliding_window": sorted(_windows(spec)),
        "compressed_layers": [a.layer for a in spec.layers],
        "sites": _sites(spec),
        "own_layers": [
            {"layer": o.layer, "kind": o.kind, "window": o.window, "why": _why_own(o)} for o in spec.own_layers
        ],
        "read_by": "running the model" if spec.probed else "config.json",
        "key_norm": any(a.key_norm for a in spec.layers),
        "weight_bytes": checkpoint.weight_bytes,
        "cache_bytes_per_token": per_token,
        "cache_bytes": [{"tokens": n, "bytes": spec.cache_bytes(n), "compressed": _reached(spec, n)} for n in CONTEXTS],
        "forms": {name: _possibility(obstacle) for name, obstacle in form_obstacles(spec).items()},
        "key_bases": {name: _possibility(obstacle) for name, obstacle in key_basis_obstacles(first).items()},
        "latent_group": {"kv_heads": group, "block_width": group * first.head_dim},
    }


def _sites(spec: ModelSpec) -> list[dict[str, int]]:
    """Return how many numbers of a token are compressed: in so many layers, so many as keys and as values."""
    counts: dict[tuple[int, int], int] = {}
    for attention in spec.layers:
        widths = attention.of("key").width, attention.of("value").width
        counts[widths] = counts.get(widths, 0) + 1
    return [{"layers": n, "keys": keys, "values": values} for (keys, values), n in counts.items()]


def _windows(spec: ModelSpec) -> set[int]:
    own = {o.layer for o in spec.own_layers if o.window}
    return own | {a.layer for a in spec.layers if a.sliding_window}


def _why_own(layer: OwnLayer) -> str:
    """Return why a layer is not compressed."""
    if layer.window:
        return f"holds {layer.window - 1} tokens at most"
    if layer.state_bytes:
        return f"keeps a state of {layer.state_bytes:,} bytes, whatever the length"
    return "caches nothing of its own"


def _reached(spec: ModelSpec, n_tokens: int) -> int:
    """Return about how many bytes the cache takes at keep 0.125, windows and states as they are."""
    own = spec.own_bytes(n_tokens)
    return int(_KEEP * (spec.cache_bytes(n_tokens) - own)) + own


def form_obstacles(spec: ModelSpec) -> dict[str, str | None]:
    """Return why each form of output cannot be made, or None where it can."""
    folded = spec.foldable_obstacle or (_ONE_HEAD if spec.layers[0].n_kv_heads == 1 else None)
    data_free = _KEY_NORM if any(a.key_norm for a in spec.layers) else None
    if spec.probed:
        data_free = _NO_WEIGHTS
    return {"coded": None, "maps_only": None, "folded": folded, "data_free": data_free}


def key_basis_obstacles(attention: AttentionSpec) -> dict[str, str | None]:
    """Return why each key basis cannot make the cache smaller, or None where it can."""
    from kvcompress.options import KEY_BASES, CompressOptions

    obstacles: dict[str, str | None] = dict.fromkeys(KEY_BASES)
    if attention.n_kv_heads == 1:
        obstacles |= dict.fromkeys(("head", "share", "frequency"), _ONE_HEAD)
    band = min(CompressOptions().band, attention.head_dim)
    if attention.head_dim % band or band % 2:
        obstacles["band"] = f"head_dim {attention.head_dim} is not a multiple of {band}: choose another --band"
    return obstacles


def _possibility(obstacle: str | None) -> dict[str, Any]:
    return {"possible": obstacle is None, "why_not": obstacle}


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout()
    grid = terminal.facts()
    rotary = f"RoPE on {document['rotary_dim']} of {document['head_dim']} channels"
    if document["rotary_dim"] is None:
        rotary = "proven when it is compressed; the rest was read by running it"
    if document["layers_without_rope"]:
        rotary += f", none in {len(document['layers_without_rope'])} of the layers"
    if document["key_norm"]:
        rotary += ", key norm"
    weights = terminal.size(document["weight_bytes"])
    query = "" if document["query_heads"] is None else f"{document['query_heads']} query, "
    heads = f"{query}{document['kv_heads']} key/value, {document['head_dim']} wide"
    grid.add_row("model", f"{document['architecture']}, {document['dtype']}, weights of {weights}")
    grid.add_row("layers", str(document["layers"]))
    grid.add_row("heads", heads)
    grid.add_row("positions", rotary)
    grid.add_row("cache", f"{document['cache_bytes_per_token']:,} bytes a token")
    sizes = (f"{terminal.size(c['bytes'])} at {terminal.tokens(c['tokens'])}" for c in document["cache_bytes"])
    grid.add_row("", ", ".join(sizes))
    sizes = (f"{terminal.size(c['compressed'])} at {terminal.tokens(c['tokens'])}" for c in document["cache_bytes"])
    grid.add_row(f"at keep {_KEEP}", ", ".join(sizes))
    for i, site in enumerate(document["sites"]):
        told = f"{site['keys']:,} numbers a token as keys, {site['values']:,} as values, in {site['layers']} layers"
        grid.add_row("" if i else "compressed", told)
    kept: dict[str, int] = {}
    for own in document["own_layers"]:
        kept[own["why"]] = kept.get(own["why"], 0) + 1
    for why, n in kept.items():
        grid.add_row("", f"{n} layers stay as they are: each {why}")
    if document["layers_with_sliding_window"] and not document["own_layers"]:
        grid.add_row("", "every layer has a sliding window; what is in it is compressed, and no more is held")
    group = document["latent_group"]
    grid.add_row("latent blocks", f"{group['kv_heads']} KV heads, {group['block_width']} numbers, by default")
    for title, name in (("forms", "forms"), ("key bases", "key_bases")):
        possible = [choice for choice, answer in document[name].items() if answer["possible"]]
        grid.add_row(title, ", ".join(possible).replace("_", " " if name == "forms" else "_"))
        for choice, answer in document[name].items():
            if not answer["possible"]:
                grid.add_row("", f"not {choice.replace('_', ' ')}: {answer['why_not']}")
    console.print(grid)
