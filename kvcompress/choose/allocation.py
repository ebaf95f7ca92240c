"""What each site keeps: the policy's share of the budget, as components with bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.bases import Components
from kvcompress.calibration.moments import Moments
from kvcompress.choose.bits import BitCurve, bit_curve
from kvcompress.choose.fitting import FittedSite
from kvcompress.model.model_spec import DTYPE_BYTES, ModelSpec, Site
from kvcompress.options import GAIN_BITS, LEVELS, CompressOptions
from kvcompress.policies import POLICIES, Policy, SiteCurve
from kvcompress.side_by_side import side_by_side


@dataclass(frozen=True)
class Choice:
    """What a site keeps: components with their bits (falling) and steps ([R]), and the loss that is predicted."""

    components: Components
    bits: Tensor
    step: Tensor
    predicted_loss: float


def choose_ranks(
    spec: ModelSpec, options: CompressOptions, fitted: Mapping[Site, FittedSite]
) -> Iterator[tuple[Site, Choice]]:
    """Yield what sites keep when the budget is shared out in whole numbers, of the model's own 16 or 32 bits."""
    curves = [SiteCurve(site, f.energy, f.basis.numbers) for site, f in fitted.items()]
    kept = make_policy(options).allocate(curves, int(options.keep * spec.cache_numbers_per_token + 1e-9))
    for (site, fit), n_items in zip(fitted.items(), kept, strict=True):
        components = fit.basis.components(n_items)
        if not options.folded:
            components = _taken(components, _stored_order(torch.zeros_like(components.block), components.block))
        rank = len(components.block)
        loss = 0.0 if rank == spec.width(site) else fit.loss(components)
        bits = torch.full((rank,), 8 * DTYPE_BYTES[spec.dtype], dtype=torch.uint8)
        yield site, Choice(components, bits, torch.ones(rank), loss)


def choose_bits(
    spec: ModelSpec,
    moments: Moments,
    options: CompressOptions,
    fitted: Mapping[Site, FittedSite],
    *,
    device: str = "cpu",
) -> Iterator[tuple[Site, Choice]]:
    """Yield what sites keep when the budget is shared out in bits, after what the gains of tokens take.

    device: where large products are computed.
    """
    full_bits = 8 * DTYPE_BYTES[spec.dtype]

    def curve_of(site: Site) -> BitCurve:
        return bit_curve(
            site,
            fitted[site],
            moments.sites[site],
            spec.attention(site),
            full_bits=full_bits,
            at_a_time=options.at_a_time,
            in_nats=options.metric == "fisher",
            device=device,
        )

    curves = side_by_side(curve_of, list(fitted), width=max(spec.width(site) for site in fitted), device=device)
    budget = int(options.keep * spec.cache_numbers_per_token * full_bits + 1e-9)
    if budget < sum(c.curve.width for c in curves):
        budget -= GAIN_BITS * len(curves)
    kept = make_policy(options).allocate([c.curve for c in curves], max(0, budget))
    for (site, fit), curve, n_items in zip(fitted.items(), curves, kept, strict=True):
        bits = curve.component_bits(n_items)
        whole = fit.basis.components(len(fit.basis.energy))
        order = _stored_order(bits, whole.block)[: int((bits > 0).sum())]
        components, bits = _taken(whole, order), bits[order]
        loss = 0.0
        if len(order) < spec.width(site):
            loss = fit.losses([components], device=device)[0] * _mean_coherence(curve, order)
        step = torch.ones(len(order))
        for level in LEVELS:
            mine = bits == level
            step[mine] = curve.step[level][order[mine]]
            loss += float(curve.loss[level][order[mine]].sum())
        yield site, Choice(components, bits.to(torch.uint8), step, loss)


def _mean_coherence(curve: BitCurve, kept: Tensor) -> float:
    """Return by how much the errors of the components that are not kept add up, weighed by what they cost."""
    dropped = torch.ones(len(curve.coherence), dtype=torch.bool)
    dropped[kept] = False
    cost = curve.loss[0][dropped]
    alone = float((cost / curve.coherence[dropped]).sum())
    return float(cost.sum()) / alone if alone > 0 else 1.0


def _stored_order(bits: Tensor, block: Tensor) -> Tensor:
    """Return the order in which components are stored: bits falling, blocks rising, then as the basis has them.

    So what a kernel needs of one block of heads lies together for each number of bits.
    """
    by_block = block.argsort(stable=True)
    return by_block[bits[by_block].argsort(descending=True, stable=True)]


def _taken(components: Components, order: Tensor) -> Components:
    return Components(components.encoder[order], components.decoder[order], components.block[order])


def make_policy(options: CompressOptions) -> Policy:
    """Return the policy of the options. Raises OptionError for layers that `middle` cannot read."""
    return POLICIES["middle"](options.layers) if options.policy == "middle" else POLICIES[options.policy]()  # type: ignore[call-arg]
