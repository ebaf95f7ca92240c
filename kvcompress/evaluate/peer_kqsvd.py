"""KQ-SVD (Lesens, Rakhshan and Rabusseau, arXiv 2512.05916; AISTATS 2026): the best low rank of K Q^T itself.

Of each KV head, with keys K and the queries Q of its whole group stacked, as the cache holds them (after RoPE): if
K Q^T = U S V^T, tokens are stored as k A with A = Q^T V_r S_r^-1, and queries meet them as q B with B = K^T U_r. Values
likewise against the rows of W_o that read them. A layer's ranks are the fewest that leave a share of the spectrum,
averaged over its heads, the same share for keys and values of all layers; here it is the share that fits the budget.

U, S and V follow from K^T K and Q^T Q alone, which add up over any number of tokens. Departs: W_o of a group is stacked
as its queries are, where the authors' code takes its mean; sinks and recent tokens stay exact as in our cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import BudgetError, OptionError
from kvcompress.model.model_spec import DTYPE_BYTES, AttentionSpec, Part, Site
from kvcompress.model.probe import probe
from kvcompress.options import CompressOptions
from kvcompress.plan import Plan
from kvcompress.site_plan import SitePlan

_WATCHING = "kvcompress_kqsvd"
#: Singular values below this share of the largest are noise.
_LEAST = 1e-7


@dataclass
class Grams:
    """Sums of one layer by part, float64, [KV heads, d, d]: x^T x of what is stored, y^T y of what reads it."""

    stored: dict[Part, Tensor] = field(default_factory=dict)
    reading: dict[Part, Tensor] = field(default_factory=dict)
    n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Factors:
    """The factorisation of one site. spectrum: [heads, head_dim], falling; z = down^T x, x^ = up z, [heads, d, d]."""

    spectrum: Tensor
    down: Tensor
    up: Tensor


def collect_grams(model: Any, ids: Tensor, *, sinks: int) -> dict[int, Grams]:
    """Return the sums of every layer that grows, over texts ids [n_windows, n_tokens] read with exact caches.

    sinks: first tokens of a text that are left out, since the cache keeps them as they are. Raises OptionError where
    the weights that read values are not known by the name of o_proj.
    """
    layers = {name: a for a in probe(model, prove=False).layers for name in a.readers}
    named = {id(model.get_submodule(name)): a for name, a in layers.items()}
    grams = {a.layer: Grams() for a in layers.values()}

    def attend(module: Any, own: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        attention = named.get(id(module))
        if attention is not None:
            _add(grams[attention.layer], query[:, :, sinks:], key[:, :, sinks:], value[:, :, sinks:])
        return compat.own_attention(module, own)(module, query, key, value, mask, **kwargs)

    device = next(model.parameters()).device
    with compat.attention_replaced(model, _WATCHING, attend), torch.no_grad():
        for window in ids:
            compat.decoder_of(model)(input_ids=window[None].to(device), use_cache=False)
    for name, attention in layers.items():
        grams[attention.layer].reading["value"] = _output_gram(model.get_submodule(name), attention)
    return grams


def _add(grams: Grams, query: Tensor, key: Tensor, value: Tensor) -> None:
    queries = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # a group's queries stacked
    _sum(grams.stored, "key", key)
    _sum(grams.stored, "value", value)
    _sum(grams.reading, "key", queries)
    grams.n_tokens += key.shape[0] * key.shape[2]


def _sum(sums: dict[Part, Tensor], part: Part, x: Tensor) -> None:
    rows = x.double().transpose(0, 1).flatten(1, 2)  # [heads, n, head_dim]
    new = (rows.transpose(1, 2) @ rows).cpu()
    sums[part] = sums[part] + new if part in sums else new


def _output_gram(module: Any, attention: AttentionSpec) -> Tensor:
    """Return the sum over a KV head's query heads of W W^T, W: the rows of W_o that read a head's values."""
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise OptionError("kq-svd needs the weights that read values, o_proj, which this model does not have.")
    heads = weight.detach().double().cpu().unflatten(1, (attention.n_kv_heads, -1, attention.of("value").head_dim))
    return torch.einsum("okgd,okge->kde", heads, heads)


def factorised(stored: Tensor, reading: Tensor, n_tokens: int) -> Factors:
    """Return the factors of x^T x and y^T y, [heads, d, d] each; components have mean square 1 over n_tokens."""
    left, right = _root(stored), _root(reading)
    u, spectrum, vh = torch.linalg.svd(left @ right)
    real = spectrum > _LEAST * spectrum[:, :1]
    inverse = torch.where(real, 1 / spectrum.clamp_min(1e-300), 0.0)
    down = right @ vh.transpose(1, 2) * inverse.unsqueeze(1)
    scale = max(1, n_tokens) ** 0.5
    return Factors(spectrum, down * scale, left @ u / scale)


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(1) @ vectors.transpose(1, 2)


def ranks_within(factors: dict[Site, Factors], numbers: int) -> dict[Site, int]:
    """Return each site's rank for all of its heads: those of the smallest tail share whose components fit `numbers`."""
    tails = {}
    for site, found in factors.items():
        total = found.spectrum.sum(1, keepdim=True)
        tails[site] = (found.spectrum.flip(1).cumsum(1) / total).mean(0)  # [d]: share of the smallest 1, 2, ...

    def ranks(share: float) -> dict[Site, int]:
        return {site: len(tail) - int((tail <= share).sum()) for site, tail in tails.items()}

    low, high = 0.0, 1.0 + 1e-9  # at `high` nothing is kept
    for _ in range(50):
        middle = (low + high) / 2
        used = sum(r * len(factors[site].spectrum) for site, r in ranks(middle).items())
        low, high = (low, middle) if used <= numbers else (middle, high)
    return ranks(high)


def kqsvd_plan(
    checkpoint: Checkpoint, model: Any, grams: dict[int, Grams], options: CompressOptions
) -> tuple[Plan, dict[Site, SiteMaps]]:
    """Return a plan and its maps at options.keep, for the run time: keys are encoded as they are cached, after RoPE."""
    spec = checkpoint.spec if checkpoint.spec.probed else probe(model, prove=False)
    factors = {
        site: factorised(g.stored[site.part], g.reading[site.part], g.n_tokens)
        for site in spec.sites
        for g in (grams[site.layer],)
    }
    ranks = ranks_within(factors, int(options.keep * spec.cache_numbers_per_token + 1e-9))
    if not any(ranks.values()):
        raise BudgetError(f"keep {options.keep} leaves no room for a single component. Raise --keep.")
    bits = 8 * DTYPE_BYTES[checkpoint.spec.dtype]
    sites, maps = [], {}
    for site, found in factors.items():
        heads, width = found.spectrum.shape
        kept = ((bits, heads * ranks[site]),) if ranks[site] else ()
        rotated = site.part == "key"
        sites.append(SitePlan(site.layer, site.part, "kq-svd", heads * width, kept, 0.0, width, rotated))
        if not sites[-1].exact:
            maps[site] = _site_maps(found, ranks[site], bits)
    plan = Plan(
        form="coded",
        source=checkpoint.source,
        source_fingerprint=checkpoint.fingerprint(),
        architecture=spec.architecture,
        dtype=checkpoint.spec.dtype,
        sites=tuple(sites),
        sinks=options.sinks,
        recent=options.recent,
        options=options.to_json(),
        calibration={"sources": list(options.calibration), "tokens": grams[spec.layers[0].layer].n_tokens},
        loss_in_nats=False,
        maps_bytes=sum(m.nbytes for m in maps.values()),
        weight_bytes=checkpoint.weight_bytes,
        own_layers=spec.own_layers,
    )
    return plan, maps


def _site_maps(found: Factors, rank: int, bits: int) -> SiteMaps:
    heads, width = found.spectrum.shape
    return SiteMaps(
        blocks=torch.arange(heads * width, dtype=torch.int32).unflatten(0, (heads, width)),
        encoder=found.down[..., :rank].transpose(1, 2).flatten(0, 1).float(),
        decoder=found.up[..., :rank].transpose(1, 2).flatten(0, 1).float(),
        block=torch.arange(heads, dtype=torch.int32).repeat_interleave(rank),
        bits=torch.full((heads * rank,), bits, dtype=torch.uint8),
        step=torch.ones(heads * rank),
        mean=None,
    )
