"""Values' decoders fitted once more: to what attention makes of values, with the codec in place.

A query reads an average over old tokens. There errors of their own cancel out, and what errors have in common adds up
(calibration.coherence). So the compressed model reads a few windows, and what a query q gets of the tokens s that it
sees compressed, sum_s a_qs v_s, is fitted by least squares to what their codes give it, sum_s a_qs z_s and sum_s a_qs.
The weights a are those of the compressed model, and each KV head has queries, and so a decoder and a mean, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvcompress import compat
from kvcompress.calibration.taps import unplanned_attention
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.layer import LayerCodecs
from kvcompress.model.model_spec import Site
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from kvcompress.runtime.simulation import Reader, Simulation, simulating
from kvcompress.side_by_side import side_by_side, solved

#: Every so many queries are taken: neighbours read nearly the same.
_EVERY = 4
#: Tokens that a GPU reads at once: whole windows, at least one.
_AT_ONCE = 8192
#: Decoders lean on what they were as if that had been seen in so many tokens.
_PRIOR_TOKENS = 8192
#: Keeps what is solved for solvable where a component is never read.
_LEAST = 1e-30


@torch.no_grad()
def fit_values(
    model: Any,
    plan: Plan,
    maps: MutableMapping[Site, SiteMaps],
    windows: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Put into `maps` the decoders and means of values that suit what the model's queries read of them.

    model: transformers', the one that the plan is of; it is given back with nothing attached. windows: [n_windows,
    seq_len] token ids. Sites that are read otherwise, or have nothing quantised, stay as they are.
    """
    with unplanned_attention():  # what is attached is tried on a few tokens
        attach_plan(model, plan, maps)
    try:
        attachment = attachment_of(model)
        if not attachment.places.are_all_read:  # latent attention and older files work on what the cache returns
            return
        sites = [s.site for s in plan.sites if s.part == "value"]
        read: dict[int, ReadValues] = {}  # by the codecs of a layer
        of: dict[Site, ReadValues] = {}
        for site, codecs in zip(sites, attachment.codecs, strict=True):
            if site in maps and is_fitted(codecs, maps[site]):
                of[site] = read[id(codecs)] = ReadValues(codecs, maps[site])
        decoder, device = compat.decoder_of(model), next(model.parameters()).device
        simulation = Simulation(plan.sinks, plan.recent, watch=partial(watched, read))
        done = 0
        for some in windows.split(_windows_at_once(windows.shape[1], device)):
            with simulating(attachment, simulation):
                decoder(input_ids=some.to(device), use_cache=True)
            done += some.numel()
            if progress:
                progress(done, windows.numel())

        def fit(site: Site) -> None:
            maps[site] = of[site].fitted(maps[site])

        width = max((s.width for s in plan.sites), default=1)
        side_by_side(fit, list(of), width=width, device=str(device))
    finally:
        detach(model)


def _windows_at_once(seq_len: int, device: torch.device) -> int:
    return max(1, _AT_ONCE // seq_len) if device.type == "cuda" else 1


def is_fitted(codecs: LayerCodecs, maps: SiteMaps) -> bool:
    """Return whether a layer's values have quantised components, in blocks of whole heads, that attention averages."""
    heads = maps.blocks.flatten().cpu()
    whole = bool((heads == torch.arange(len(heads))).all()) and maps.blocks.shape[1] % codecs.value_shape[1] == 0
    quantised = bool((maps.bits < 16).any())
    return whole and quantised and maps.mean is not None and codecs.value_rotary is None


def watched(read: dict[int, ReadValues], codecs: LayerCodecs, latents: Tensor | None, value: Tensor) -> Reader:
    """Return what is told of one attention's queries; see simulation.Watch."""
    seen = read.get(id(codecs))
    return (lambda _: None) if seen is None or latents is None else seen.reader(latents, value)


class ReadValues:
    """Sums over what queries read of a layer's values: of codes' averages z and weights' sums a, [z; a] [z; a]^T and
    [z; a] x^T, with x what they should have read. One for each KV head; z are the R components of its block."""

    def __init__(self, codecs: LayerCodecs, maps: SiteMaps) -> None:
        assert codecs.value is not None
        n_heads, width = codecs.value_shape
        device = codecs.value.encoder.device
        n_blocks = len(maps.blocks)
        members = [(maps.block == b).nonzero()[:, 0] for b in range(n_blocks)]
        self._n = max(len(m) for m in members)
        # places of a block's components; those that it lacks are one of zeros, behind all others
        padded = [functional.pad(m, (0, self._n - len(m)), value=len(maps.block)) for m in members]
        self.members, self._places = members, torch.stack(padded).to(device)
        self._n_tokens = 0
        self._gram = torch.zeros(n_heads, self._n + 1, self._n + 1, dtype=torch.float64, device=device)
        self._wanted = torch.zeros(n_heads, self._n + 1, width, dtype=torch.float64, device=device)

    def reader(self, latents: Tensor, value: Tensor) -> Reader:
        """latents: [batch, n_tokens, R], of value: [batch, kv heads, n_tokens, width] -> what adds queries of them.

        It is told their weights."""
        self._n_tokens += value.shape[0] * value.shape[2]
        by_block = functional.pad(latents, (0, 1))[..., self._places].permute(0, 2, 1, 3)  # [batch, blocks, tokens, R]
        by_head = by_block.repeat_interleave(value.shape[1] // len(self._places), 1)
        exact = value.float()

        def add(weights: Tensor) -> None:
            some, n = weights[:, :, ::_EVERY], weights.shape[-1]
            seen = torch.cat([some @ by_head[:, :, :n], some.sum(-1, keepdim=True)], -1).transpose(0, 1).flatten(1, 2)
            wanted = (some @ exact[:, :, :n]).transpose(0, 1).flatten(1, 2)
            self._gram += seen.transpose(1, 2) @ seen
            self._wanted += seen.transpose(1, 2) @ wanted

        return add

    def fitted(self, maps: SiteMaps) -> SiteMaps:
        """Return the maps with each head's columns of the decoder, and its part of the mean, fitted to the sums."""
        before = self._rows(maps)
        # a place that its block lacks has no power, and stays zero
        lean = _PRIOR_TOKENS / max(1, self._n_tokens) * self._gram.diagonal(dim1=1, dim2=2) + _LEAST
        after = solved(self._gram + lean.diag_embed(), self._wanted + lean.unsqueeze(2) * before).cpu()
        decoder, step = maps.decoder.double(), maps.step.double()
        for b, mine in enumerate(self.members):
            heads = after[self._in(b), : len(mine)].transpose(0, 1)  # [R, heads of the block, width]
            decoder[mine] = heads.flatten(1) / step[mine, None]
        limit = torch.finfo(maps.decoder.dtype).max
        decoder = decoder.clamp(-limit, limit).to(maps.decoder.dtype)
        return replace(maps, decoder=decoder, mean=after[:, -1].flatten().float())

    def _rows(self, maps: SiteMaps) -> Tensor:
        """Return of each head its part of the decoder, in units of the steps, and below it of the mean.

        [heads, R + 1, width], float64.
        """
        assert maps.mean is not None
        n_heads, size, width = self._wanted.shape
        rows = torch.zeros(n_heads, size, width, dtype=torch.float64)
        scaled = maps.decoder.double() * maps.step.double()[:, None]
        for b, mine in enumerate(self.members):
            rows[self._in(b), : len(mine)] = scaled[mine].unflatten(1, (-1, width)).transpose(0, 1)
        rows[:, -1] = maps.mean.double().view(n_heads, width)
        return rows.to(self._wanted.device)

    def _in(self, block: int) -> slice:
        """Return the heads of a block."""
        n = len(self._gram) // len(self.members)
        return slice(block * n, (block + 1) * n)
