"""Encode, quantise, pack and decode the tokens of one site; the reference implementation in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.packing import pack_codes, unpack_codes
from kvcompress.codec.quantise import best_gain, dequantise, gain, gain_errors, least_gain, quantise
from kvcompress.codec.tiles import Tiles, is_tileable
from kvcompress.model.model_spec import Part
from kvcompress.options import GAIN_BITS, TILE_TOKENS
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.site_plan import runs

#: Tokens encoded at once, which bounds the memory that encoding a long prompt takes.
_ENCODED_TOKENS = 2048


class Codes(NamedTuple):
    """What is stored of tokens. components: [..., R], codes of quantised ones, the numbers of 16- and 32-bit ones;
    gain: [...], codes of the gains, None where nothing is quantised."""

    components: Tensor
    gain: Tensor | None


class SiteCodec:
    """z = E (x - m) and x^ = m + g D z for one site, block by block, computed in float32.

    Components keep the order of the maps file (bits falling); steps are folded into `encoder` and `decoder`, so z is
    in units of the step. Blocks with fewer components than the fullest one are padded with zeros inside the maps.
    """

    def __init__(self, maps: SiteMaps, device: torch.device, *, tiled_for: Part | None = None) -> None:
        """tiled_for: rows have the tile layout of that part, the plain one by default; see `layer_codecs`."""
        n_blocks, width = maps.blocks.shape
        block = maps.block.long().cpu()
        counts = torch.bincount(block, minlength=n_blocks)
        slots = int(counts.max()) if len(block) else 0
        # slot of a component among those of its block, in file order
        order = torch.argsort(block, stable=True)
        slot = torch.empty_like(block)
        slot[order] = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block[order]]
        step = maps.step.float().cpu().unsqueeze(1)
        encoder = torch.zeros(n_blocks, slots, width)
        decoder = torch.zeros(n_blocks, slots, width)
        encoder[block, slot] = maps.encoder.float().cpu() / step
        decoder[block, slot] = maps.decoder.float().cpu() * step
        place = torch.empty(n_blocks * width, dtype=torch.long)
        place[maps.blocks.flatten().long().cpu()] = torch.arange(n_blocks * width)
        self.n_components = len(block)
        self.encoder, self.decoder = encoder.to(device), decoder.to(device)
        self._gather = maps.blocks.flatten().long().to(device)  # blocks' order -> numbers of x
        self._place = place.to(device)  # number of x -> its place in the blocks' order
        self._component = (block * slots + slot).to(device)
        self._shape = (n_blocks, slots, width)
        self.block = block.tolist()  # of each component
        # One block in its own order: nothing to gather or scatter around the matrix product.
        self._one_block = n_blocks == 1 and _by_heads(maps)
        self.mean = None if maps.mean is None else maps.mean.float().to(device)
        self.classes = runs(maps.bits.tolist())
        quantised = [c for c in self.classes if c[0] <= 8]
        self._first = quantised[0][1] if quantised else self.n_components  # components before it are not quantised
        self.has_gain = bool(quantised)
        self.step = step[:, 0].to(device)
        #: Called with (self, z in units of the steps, codes of gains) for all that is encoded; see `distance`.
        self.watch: Callable[[SiteCodec, Tensor, Tensor | None], None] | None = None
        #: Where other ranks of an engine hold other heads of the site: returns the sum of all ranks' `gain_errors`, so
        #: that they choose the gains that one codec of all heads would. Called once for every `pack`.
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        self._half = 2.0 ** (maps.bits[self._first :].float().to(device) - 1)
        self.tiles = None if tiled_for is None else Tiles(tiled_for, maps.bits, maps.block, device)

    def encode(self, x: Tensor, code: Tensor | None = None) -> Codes:
        """x: [..., n], the mean already subtracted -> what is stored of it. code: of the gains [...], if known."""
        z = self.project(x)
        if code is None and self.has_gain:
            code = best_gain(z[..., self._first :], self._half)
        if self.watch is not None:
            self.watch(self, z, code)
        if code is None:
            return Codes(self._rounded(z), None)
        z = z / gain(code).unsqueeze(-1)
        numbers, quantised = self._rounded(z[..., : self._first]), quantise(z[..., self._first :], self._half)
        return Codes(torch.cat([numbers, quantised], -1), code)

    def gain_errors(self, z: Tensor) -> Tensor:
        """Return each token's error under each gain: [..., 16], zeros where nothing is quantised; z: of `project`."""
        return gain_errors(z[..., self._first :], self._half)

    def gains_by(self, errors: Tensor) -> Tensor | None:
        """Return the codes of the gains by all ranks' errors, None where this rank stores none; errors: this rank's."""
        assert self.sum_over_ranks is not None, "a codec of all heads chooses gains as it encodes"
        errors = self.sum_over_ranks(errors)  # also where nothing is quantised here: the others wait for it
        return least_gain(errors) if self.has_gain else None

    def project(self, x: Tensor) -> Tensor:
        """x: [..., n] -> E x [..., R], float32, in units of the steps."""
        return self._blockwise(x, self.encoder)

    def latents(self, codes: Codes) -> Tensor:
        """Return z^ [..., R], float32, in units of the steps, gains applied."""
        components, code = codes
        if code is None:
            return components
        quantised = dequantise(components[..., self._first :], self._half)
        return torch.cat([components[..., : self._first], quantised], -1) * gain(code).unsqueeze(-1)

    def roundtrip(self, x: Tensor) -> Tensor:
        """x: [..., n], the mean already subtracted -> D z^ [..., n], float32: what attention will see of it."""
        return self.decode(self.latents(self.encode(x)))

    def decode(self, z: Tensor) -> Tensor:
        """z: [..., R] in units of the steps -> D z [..., n], float32, without the mean."""
        if self._one_block:
            return z.float() @ self.decoder[0]
        n_blocks, slots, _ = self._shape
        padded = torch.zeros(*z.shape[:-1], n_blocks * slots, device=z.device)
        padded[..., self._component] = z.float()
        x = torch.einsum("...bs,bsw->...bw", padded.unflatten(-1, (n_blocks, slots)), self.decoder)
        return x.flatten(-2)[..., self._place]

    @property
    def number_places(self) -> Tensor:
        """Return which pairs of bytes of a row hold the components of 16 bits: [n]."""
        if self.tiles is not None:
            return self.tiles.number_places
        n_numbers = sum(stop - first for bits, first, stop in self.classes if bits == 16)
        return torch.arange(n_numbers * BLOCK_TOKENS, device=self.encoder.device)

    @cached_property
    def dense_decoder(self) -> Tensor:
        """D of all blocks as one matrix, [R, n], float32, kept from its first use on."""
        return self.decode(torch.eye(self.n_components, device=self.decoder.device))

    def absorb(self, query: Tensor) -> Tensor:
        """Return D^T q [..., R], so that q . (D z) = (D^T q) . z; query: [..., n]."""
        return self._blockwise(query, self.decoder)

    def _blockwise(self, x: Tensor, rows: Tensor) -> Tensor:
        """x: [..., n]; rows: [n_blocks, slots, width] -> each component's row times its block of x: [..., R]."""
        if self._one_block:
            return x.float() @ rows[0].T
        n_blocks, _, width = self._shape
        blocked = x.float()[..., self._gather].unflatten(-1, (n_blocks, width))
        return torch.einsum("...bw,bsw->...bs", blocked, rows).flatten(-2)[..., self._component]

    def pack(self, x: Tensor) -> Tensor:
        """x: [batch, n_blocks * 32, n], the mean already subtracted -> uint8 [batch, n_blocks, bytes of a block]."""
        parts, codes = x.split(_ENCODED_TOKENS, 1), None
        if self.sum_over_ranks is not None:
            codes = self.gains_by(torch.cat([self.gain_errors(self.project(part)) for part in parts], 1))
        known = [None] * len(parts) if codes is None else codes.split(_ENCODED_TOKENS, 1)
        return torch.cat([self._packed(self.encode(*own)) for own in zip(parts, known, strict=True)], 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """packed: uint8 [batch, n_blocks, bytes of a block] -> z^ [batch, n_blocks * 32, R], float32."""
        batch, n_blocks, _ = packed.shape
        z = torch.empty(batch, n_blocks * BLOCK_TOKENS, self.n_components, device=packed.device)
        start = 0
        if self.tiles is not None:
            self.tiles.unpack(packed, z)
            start = self.tiles.n_bytes
        else:
            for bits, first, last in self.classes:
                stop = start + (last - first) * bits * BLOCK_TOKENS // 8
                unpack_codes(packed[..., start:stop], bits, z[..., first:last])
                start = stop
        if self.has_gain:  # in place, as `latents` does it: this is where a step of generation spends its time
            code = torch.empty(*z.shape[:2], 1, device=packed.device)
            unpack_codes(packed[..., start:], GAIN_BITS, code)
            z[..., self._first :] -= self._half - 0.5
            z *= gain(code)
        return z

    def _packed(self, codes: Codes) -> Tensor:
        batch, n_tokens, _ = codes.components.shape
        parts = [torch.zeros(batch, n_tokens // BLOCK_TOKENS, 0, dtype=torch.uint8, device=codes.components.device)]
        if self.tiles is not None:
            parts.append(self.tiles.pack(codes.components))
        else:
            parts += [pack_codes(codes.components[..., first:last], bits) for bits, first, last in self.classes]
        if codes.gain is not None:
            parts.append(pack_codes(codes.gain.unsqueeze(-1), GAIN_BITS))
        return torch.cat(parts, -1)

    def _rounded(self, z: Tensor) -> Tensor:
        """Return components that are not quantised as their storage rounds them."""
        if any(bits == 32 for bits, *_ in self.classes):
            return z
        limit = torch.finfo(torch.float16).max  # a token far outside the calibration must not become inf or NaN
        return z.clamp(-limit, limit).half().float()


def layer_codecs(
    key: SiteMaps | None, value: SiteMaps | None, device: torch.device, *, turn: int
) -> tuple[SiteCodec | None, SiteCodec | None]:
    """Return the codecs of a layer's keys and values; None for a part without maps.

    Both have the tile layout where keys are in turns of a multiple of TILE_TOKENS and both sites can have it.
    """
    tiled = turn % TILE_TOKENS == 0 and all(
        maps is not None and _by_heads(maps) and is_tileable(maps.bits, maps.block) for maps in (key, value)
    )
    return (
        None if key is None else SiteCodec(key, device, tiled_for="key" if tiled else None),
        None if value is None else SiteCodec(value, device, tiled_for="value" if tiled else None),
    )


def _by_heads(maps: SiteMaps) -> bool:
    """Return whether blocks are whole neighbouring heads, as `latent` and `per_head` make them."""
    numbers = maps.blocks.flatten().cpu()
    return bool((numbers == torch.arange(len(numbers))).all())
