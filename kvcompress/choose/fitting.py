"""Fitting a basis to one site's moments, with energies that are true to the whole site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.bases import BASES, Basis, Components, FittedBasis
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.map_budget import default_group
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.choose.turning import group_in_turns
from kvcompress.model.model_spec import AttentionSpec, Part
from kvcompress.options import GROUPED, CompressOptions
from kvcompress.policies.base import tail_energy

#: Ranks at which a restricted basis's predicted loss is compared with that of the whole site.
_CHECKED_RANKS = 12


def key_basis(checkpoint: Checkpoint, options: CompressOptions) -> Basis:
    """Return the basis for keys that the options name, blocks chosen to keep the maps light."""
    name = options.key_basis
    if name == "latent":
        return BASES[name](_group(checkpoint, options), at_a_time=_at_a_time(options))  # type: ignore[call-arg]
    if name == "per_head":
        return BASES[name](at_a_time=_at_a_time(options))  # type: ignore[call-arg]
    if name == "band":
        return BASES[name](options.band)  # type: ignore[call-arg]
    if name in ("frequency", GROUPED):  # a group's keys are mixed as `frequency` mixes all heads
        return BASES["frequency"](whole_heads=options.folded)  # type: ignore[call-arg]
    return BASES[name]()


def value_basis(checkpoint: Checkpoint, options: CompressOptions) -> Basis:
    """Return the basis for values that the options name."""
    if options.value_basis == "latent":
        group = options.group if options.folded else _group(checkpoint, options)
        unit = checkpoint.spec.layers[0].head_dim if options.folded else 1  # a fold caches whole virtual heads
        return BASES["latent"](group, unit=unit, at_a_time=_at_a_time(options))  # type: ignore[call-arg]
    if options.value_basis == "per_head":
        return BASES["per_head"](at_a_time=_at_a_time(options))  # type: ignore[call-arg]
    return BASES[options.value_basis]()


def _at_a_time(options: CompressOptions) -> int:
    """Return how many components are one item of a basis; where they get bits, that takes them together instead."""
    return 1 if options.quantised else options.at_a_time


def _group(checkpoint: Checkpoint, options: CompressOptions) -> int:
    """Return how many KV heads a block of `latent` has, unless that is chosen; with turns one that the kernels take."""
    return options.group or group_in_turns(checkpoint.spec, options, default_group(checkpoint, options.keep))


@dataclass(frozen=True)
class FittedSite:
    """A fitted basis, its blocks [n_blocks, width], and the moments it was fitted to.

    energy: [n_items], what leaving each item out costs the whole site, correlations between blocks included.
    `rotated`: keys that are encoded after RoPE, or have none. `covariance` and `fisher` are those of the widest
    stored blocks, [n_outer, outer width, outer width], each of which is some of the blocks one after another: `inner`,
    [n_outer, n_inner].
    """

    name: str
    basis: FittedBasis
    blocks: Tensor
    energy: Tensor
    centred: bool
    rotated: bool
    inner: Tensor
    covariance: Tensor
    fisher: Tensor

    def loss(self, components: Components) -> float:
        """Return 1/2 tr(F E[e e^T]) of keeping these components, over the widest blocks whose moments are stored."""
        return self.losses([components])[0]

    def losses(self, kept: Iterable[Components], *, device: str = "cpu") -> list[float]:
        """Return the loss of each of several choices of components, computed on a device.

        What decoding leaves of a block depends on that block alone: R is block-diagonal in tr(F R C R^T).
        """
        n_blocks, width = self.blocks.shape
        apart = (self.inner.shape[1], width)
        covariance = self.covariance.to(device).unflatten(1, apart)  # [n_outer, n_inner, width, outer width]
        fisher = self.fisher.to(device).unflatten(2, apart)
        found = []
        for components in kept:
            left = _residuals(components, n_blocks, width, device)[self.inner.to(device)]
            error = (left @ covariance).flatten(1, 2).unflatten(2, apart).transpose(1, 2) @ left.mT
            found.append(0.5 * float((fisher.transpose(1, 2) * error).sum()))
        return found


def fit_site(
    basis: Basis,
    moments: SiteMoments,
    attention: AttentionSpec,
    part: Part,
    options: CompressOptions,
    *,
    device: str = "cpu",
) -> FittedSite:
    """Return the basis fitted to a site, under the metric that the options choose; moments and fit are on the CPU.

    device: where large products are computed.
    """
    return with_true_energy(fitted_basis(basis, moments, attention, part, options), options, device=device)


def fitted_basis(
    basis: Basis, moments: SiteMoments, attention: AttentionSpec, part: Part, options: CompressOptions
) -> FittedSite:
    """Return what `fit_site` does, with the energies that the basis itself believes in."""
    blocks = basis.blocks(attention)
    centred = not options.folded  # a fold must be linear
    covariance = moments.covariance(blocks, centred=centred)
    fisher = moments.fisher_information(blocks)
    by_activation = options.metric == "activation"
    fitted = basis.fit(covariance, _identity_like(fisher) if by_activation else fisher)
    outer, inner = _gathered(blocks, moments.partition_with(blocks))
    wide = moments.covariance(outer, centred=centred), moments.fisher_information(outer)
    rotated = part == "key" and (basis.commutes_with_rope or attention.rotary_dim == 0)
    return FittedSite(basis.name, fitted, blocks, fitted.energy, centred, rotated, inner, *wide)


def with_true_energy(site: FittedSite, options: CompressOptions, *, device: str = "cpu") -> FittedSite:
    """Return a fitted site with energies that are true to it as a whole. device: where large products are computed."""
    if options.metric == "activation" or site.inner.shape[1] == 1:
        return site
    return replace(site, energy=true_energy(site, device=device))


def true_energy(site: FittedSite, *, device: str = "cpu") -> Tensor:
    """Return energies whose tails are the whole site's predicted loss at a dozen ranks, scaled in between.

    A basis of small blocks takes errors in different blocks as unrelated. They are not, and a policy that believed
    it would starve such a site: on SmolLM2 `frequency` keys lose several times what their own energies say.
    """
    n_items = len(site.basis.energy)
    ranks = torch.linspace(0, n_items, min(_CHECKED_RANKS, n_items) + 1).round().long().tolist()
    believed = tail_energy(site.basis.energy)
    true = site.losses((site.basis.components(r) for r in ranks), device=device)
    energy = site.basis.energy.clone()
    for (first, last), (more, less) in zip(pairwise(ranks), pairwise(true), strict=True):
        drop = float(believed[first] - believed[last])
        saved = max(0.0, more - less)
        energy[first:last] = energy[first:last] * (saved / drop) if drop > 0 else saved / (last - first)
    return energy


def _identity_like(fisher: Tensor) -> Tensor:
    return torch.eye(fisher.shape[1], dtype=fisher.dtype).expand_as(fisher)


def _gathered(blocks: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Return wider blocks with the numbers of those that they contain one after another, and which these are.

    blocks: [n_blocks, width]; outer: [n_outer, outer width]. Returns [n_outer, outer width] and [n_outer, n_inner].
    """
    place = torch.empty(outer.numel(), dtype=torch.long)
    place[outer] = torch.arange(len(outer))[:, None].expand_as(outer)
    inner = place[blocks[:, 0]].argsort(stable=True).reshape(len(outer), -1)
    return blocks[inner].flatten(1), inner


def _residuals(components: Components, n_blocks: int, width: int, device: str) -> Tensor:
    """Return I - D E of every block, [n_blocks, width, width]: what is left of a token that is encoded and decoded."""
    encoder, decoder = (t.to(device, torch.float64) for t in (components.encoder, components.decoder))
    residual = torch.eye(width, dtype=torch.float64, device=device).repeat(n_blocks, 1, 1)
    for b in range(n_blocks):
        mine = (components.block == b).nonzero()[:, 0].to(device)
        residual[b] -= decoder[mine].T @ encoder[mine]
    return residual
