"""Plans and maps for tests, built from moments by hand, at any share of the components, full rank included."""

from __future__ import annotations

from typing import Any

import torch

from kvcompress.bases import BASES, Basis
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.turns import turned_moments
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.plan import Plan
from kvcompress.site_plan import SitePlan


def coded_plan(
    checkpoint: Checkpoint,
    moments: Moments,
    *,
    key_basis: str = "latent",
    value_basis: str = "latent",
    share: float = 1.0,
    sinks: int = 2,
    recent: int = 4,
    turn: int = 1,
    folded: bool = False,
    basis_arguments: dict[str, dict[str, Any]] | None = None,
) -> tuple[Plan, dict[Site, SiteMaps]]:
    """Return a plan that keeps the same share of every site's components, and maps for every site.

    With share 1 every site is coded at full rank; the fixture `never_exact` makes the run time use those maps.
    """
    spec = checkpoint.spec
    if turn > 1:
        turns = {site: turn for site in spec.sites if site.part == "key"}
        moments = turned_moments(spec, moments, turns, seed=0)
    options = CompressOptions(
        key_basis=key_basis, value_basis=value_basis, sinks=sinks, recent=recent, folded=folded, ranks_only=True
    )
    arguments = basis_arguments or {}
    bases: dict[str, Basis] = {
        "key": BASES[key_basis](**arguments.get("key", {})),
        "value": BASES[value_basis](**arguments.get("value", {})),
    }
    bits = 32 if spec.dtype == "float32" else 16
    map_dtype = torch.float32 if spec.dtype == "float32" else torch.float16
    sites, maps = [], {}
    for site in spec.sites:
        attention, basis = spec.attention(site), bases[site.part]
        blocks = basis.blocks(attention)
        centred = not folded
        covariance = moments.sites[site].covariance(blocks, centred=centred)
        fitted = basis.fit(covariance, moments.sites[site].fisher_information(blocks))
        components = fitted.components(round(share * len(fitted.energy)))
        rank = len(components.block)
        rotated = site.part == "key" and (basis.commutes_with_rope or attention.rotary_dim == 0)
        sites.append(
            SitePlan(
                layer=site.layer,
                part=site.part,
                basis=basis.name,
                width=attention.width,
                bits=((bits, rank),) if rank else (),
                predicted_loss=0.0,
                block_width=blocks.shape[1],
                rotated=rotated,
                turn=turn if site.part == "key" and not rotated else 1,
            )
        )
        maps[site] = SiteMaps(
            blocks=blocks.int(),
            encoder=components.encoder.to(map_dtype),
            decoder=components.decoder.to(map_dtype),
            block=components.block.int(),
            bits=torch.full((rank,), bits, dtype=torch.uint8),
            step=torch.ones(rank),
            mean=moments.sites[site].mean.float() if centred else None,
        )
    plan = Plan(
        form="folded" if folded else "coded",
        source=checkpoint.source,
        source_fingerprint=checkpoint.fingerprint(),
        architecture=spec.architecture,
        dtype=spec.dtype,
        sites=tuple(sites),
        sinks=sinks,
        recent=recent,
        options=options.to_json(),
        calibration=moments.protocol,
        loss_in_nats=True,
        maps_bytes=sum(m.nbytes for m in maps.values()),
        weight_bytes=checkpoint.weight_bytes,
    )
    return plan, maps
