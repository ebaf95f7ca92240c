"""The maps of one site as parameters: z = E (x - m), quantised as at run time, x^ = m + g D z, with gradients.

The gradient passes straight through the quantiser inside its range and stops outside it; a step receives that of
Learned Step Size Quantisation (arXiv 1902.08153). A token's gain is chosen as at run time and gets none: it is the
best of a few, so that a small change of the maps leaves it where it is.

Parameters are changes, zero at first, in units of the error that the codec makes there anyway: the size of a row times
the relative error of its component. One learning rate then fits rows of any scale and of any bits (what is small
against the error of one bit would drown a component of eight), and the first forward is the run time's to the last bit.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.quantise import dequantise, gain, quantise
from kvcompress.options import GAIN_BITS

#: What decoders must stay. free: anything. channels: one matrix of heads for all channels (`head`). complex: a complex
#: matrix of heads for each frequency, so that decoding commutes with RoPE (folded `frequency`, `grouped`). fixed: as
#: they are (`share`, whose heads are copied).
Shape = Literal["free", "channels", "complex", "fixed"]
_TINY = 1e-8
#: Tokens of one program of the kernel that chooses gains.
GAIN_TOKENS = 8
#: The relative error that stands for that of components which are not quantised: of coded sites, of folded ones.
_UNQUANTISED_ERROR = {"coded": 0.1, "folded": 1.0}


class TrainableSite(nn.Module):
    """The codec of a site with trainable maps; computes what codec.SiteCodec does, in float32 (or the dtype of x)."""

    encoder: Tensor
    decoder: Tensor
    step: Tensor
    mean: Tensor | None
    half_range: Tensor
    place: Tensor
    gather: Tensor
    component: Tensor
    numbers: Tensor
    encoder_unit: Tensor
    decoder_unit: Tensor
    mean_unit: Tensor | None
    mean_change: nn.Parameter | None
    encoder_change: nn.Parameter | None
    decoder_change: nn.Parameter | None
    step_change: nn.Parameter | None

    def __init__(self, maps: SiteMaps, *, head_dim: int, shape: Shape = "free") -> None:
        super().__init__()
        self.maps, self.head_dim, self.decoder_shape = maps, head_dim, shape
        blocks, block, bits = maps.blocks.long().cpu(), maps.block.long().cpu(), maps.bits.float().cpu()
        component, slots = _slots(block, len(blocks))
        numbers = blocks.flatten()
        self.layout = (len(blocks), slots, blocks.shape[1])
        self.in_order = len(blocks) == 1 and bool((numbers == torch.arange(len(numbers))).all())
        self.n_numbers = int((bits > 8).sum())  # components that are not quantised come first
        self.rounds_to_half = not bool((bits == 32).any())
        constants = {
            "encoder": maps.encoder.float().cpu(),
            "decoder": maps.decoder.float().cpu(),
            "step": maps.step.float().cpu(),
            "mean": None if maps.mean is None else maps.mean.float().cpu(),
            "half_range": 2.0 ** (bits[self.n_numbers :] - 1),
            "gather": numbers,
            "place": numbers.argsort(),
            "component": component,
            "numbers": blocks[block],
            **_units(maps),
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self._add_changes()

    def _add_changes(self) -> None:
        """Make the parameters: changes of what this site has, None for what it has not or what is fixed."""
        rank, width = self.encoder.shape
        coded = self.mean is not None  # else folded: no mean, and the encoder lies in the projection's weight
        shared = {"free": 1, "channels": self.head_dim, "complex": 2, "fixed": 0}[self.decoder_shape]
        sizes = {
            "mean_change": (len(self.mean),) if self.mean is not None else None,
            "encoder_change": (rank, width) if coded and rank else None,
            "decoder_change": (rank // shared, width) if shared and rank else None,
            "step_change": (rank - self.n_numbers,) if coded and rank > self.n_numbers else None,
        }
        for name, size in sizes.items():
            self.register_parameter(name, None if size is None else nn.Parameter(torch.zeros(size)))

    @property
    def rank(self) -> int:
        return len(self.component)

    def current_encoder(self) -> Tensor:
        if self.encoder_change is None:
            return self.encoder
        return self.encoder + self.encoder_unit * self.encoder_change

    def current_decoder(self) -> Tensor:
        if self.decoder_change is None:
            return self.decoder
        change: Tensor = self.decoder_change
        if self.decoder_shape == "channels":  # component t * head_dim + c: virtual head t, channel c
            change = change.repeat_interleave(self.head_dim, 0)
        elif self.decoder_shape == "complex":  # of a virtual head first all real, then all imaginary components
            real = change.unflatten(0, (-1, self.head_dim // 2))
            re, im = real.chunk(2, -1)
            change = torch.stack([real, torch.cat([-im, re], -1)], 1).flatten(0, 2)
        return self.decoder + self.decoder_unit * change

    def current_step(self) -> Tensor:
        if self.step_change is None:
            return self.step
        quantised = self.step[self.n_numbers :] * self.step_change.exp()
        return torch.cat([self.step[: self.n_numbers], quantised])

    def current_mean(self) -> Tensor | None:
        if self.mean is None or self.mean_unit is None or self.mean_change is None:
            return self.mean
        return self.mean + self.mean_unit * self.mean_change

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., n], the mean already subtracted -> D z^ [..., n], without the mean."""
        if not self.rank:
            return torch.zeros_like(x)
        step = self.current_step().unsqueeze(1)
        z = self._project(x, self._padded(self.current_encoder() / step))
        return self._expand(self.quantised(z), self._padded(self.current_decoder() * step))

    def decode(self, z: Tensor) -> Tensor:
        """z: [..., R] -> D z [..., n], of a site that is not quantised: one product, whatever its blocks."""
        rows = self.current_decoder()
        n_numbers = len(self.gather)
        whole = rows.new_zeros(len(rows), n_numbers).scatter(1, self.numbers, rows)
        return z @ whole

    def quantised(self, z: Tensor) -> Tensor:
        """Return what the cache keeps of z [..., R], in units of the steps, gains applied; gradients pass through."""
        return _Stored.apply(z, self.half_range, self.rounds_to_half)

    def trained_maps(self) -> SiteMaps:
        """Return the maps as they are now, on the CPU and in the dtypes of the file."""
        old = self.maps
        with torch.no_grad():
            mean = self.current_mean()
            encoder, decoder, step = (
                t.float().cpu() for t in (self.current_encoder(), self.current_decoder(), self.current_step())
            )
        if old.encoder.dtype == torch.float16 and len(encoder):  # a row too large for it moves its scale
            limit = torch.finfo(torch.float16).max / 2
            scale = (encoder.abs().amax(1, keepdim=True) / limit).clamp_min(1.0)
            encoder, decoder = encoder / scale, decoder * scale
            step = torch.where(old.bits.cpu() < 16, step / scale[:, 0], step)
        return SiteMaps(
            blocks=old.blocks.int(),
            encoder=encoder.to(old.encoder.dtype),
            decoder=decoder.to(old.decoder.dtype),
            block=old.block.int(),
            bits=old.bits,
            step=step,
            mean=None if mean is None else mean.float().cpu(),
        )

    def _padded(self, rows: Tensor) -> Tensor:
        """Return rows [R, w] block by block: [n_blocks, slots, w]."""
        n_blocks, slots, width = self.layout
        flat = rows.new_zeros(n_blocks * slots, width).index_copy(0, self.component, rows)
        return flat.unflatten(0, (n_blocks, slots))

    def _project(self, x: Tensor, rows: Tensor) -> Tensor:
        n_blocks, _, width = self.layout
        if self.in_order:
            return x @ rows[0].T
        blocked = x[..., self.gather].unflatten(-1, (n_blocks, width))
        return torch.einsum("...bw,bsw->...bs", blocked, rows).flatten(-2)[..., self.component]

    def _expand(self, z: Tensor, rows: Tensor) -> Tensor:
        n_blocks, slots, _ = self.layout
        if self.in_order:
            return z @ rows[0]
        padded = z.new_zeros(*z.shape[:-1], n_blocks * slots).index_copy(-1, self.component, z)
        x = torch.einsum("...bs,bsw->...bw", padded.unflatten(-1, (n_blocks, slots)), rows)
        return x.flatten(-2)[..., self.place]


class _Stored(torch.autograd.Function):
    """What the cache gives back of latents; the gradient passes, but not where a quantiser clips."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, half: Tensor, rounds_to_half: bool) -> Tensor:
        """z: [..., R] in units of the steps; half: 2^(bits - 1) of the last components, which are quantised."""
        first = z.shape[-1] - len(half)
        ctx.first, inside = first, None
        out = torch.empty_like(z)
        scaled = z
        if len(half):
            g = gain(chosen_gain(z[..., first:].float(), half.float())).unsqueeze(-1).to(z.dtype)
            scaled = z / g
            u = scaled[..., first:]
            torch.mul(dequantise(quantise(u, half), half), g, out=out[..., first:])
            inside = u.abs() <= half
        if first:
            numbers = scaled[..., :first]
            if rounds_to_half:
                limit = torch.finfo(torch.float16).max
                numbers = numbers.clamp(-limit, limit).half().to(z.dtype)
            out[..., :first] = numbers * g if len(half) else numbers
        ctx.save_for_backward(inside)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        if inside is None:
            return grad, None, None
        if ctx.first:
            return torch.cat([grad[..., : ctx.first], grad[..., ctx.first :] * inside], -1), None, None
        return grad * inside, None, None


def chosen_gain(z: Tensor, half: Tensor) -> Tensor:
    """Return quantise.best_gain(z, half) up to rounding: by one kernel on a GPU, else with half of its passes."""
    if z.is_cuda and (n_tokens := z[..., 0].numel()) % GAIN_TOKENS == 0:
        from kvcompress.kernels.packing import gain_kernel  # Triton comes with torch's builds for GPUs alone

        z, codes = z.contiguous(), torch.empty(z.shape[:-1], dtype=torch.uint8, device=z.device)
        width = z.shape[-1]
        gain_kernel[(n_tokens // GAIN_TOKENS,)](z, half, codes, width, 0, width, WIDTH=32, TOKENS=GAIN_TOKENS)
        return codes
    best = torch.zeros(z.shape[:-1], dtype=torch.uint8, device=z.device)
    least = torch.full(z.shape[:-1], float("inf"), device=z.device)
    below, above = -half, half - 1
    for code in range(2**GAIN_BITS):
        g = float(gain(torch.tensor(code)))
        u = z * (1 / g)  # the error in units of the gain
        error = torch.linalg.vector_norm(u.floor().clamp_(below, above).sub_(u).add_(0.5), dim=-1).mul_(g)
        best = torch.where(error < least, code, best)
        least = torch.minimum(least, error)
    return best


def _slots(block: Tensor, n_blocks: int) -> tuple[Tensor, int]:
    """Return each component's place among the padded blocks, [R], and how many slots a block has."""
    counts = torch.bincount(block, minlength=n_blocks)
    slots = int(counts.max()) if len(block) else 0
    order = torch.argsort(block, stable=True)
    slot = torch.empty_like(block)
    slot[order] = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block[order]]
    return block * slots + slot, slots


def _units(maps: SiteMaps) -> dict[str, Tensor | None]:
    """Return what a change of 1 is: of rows of the encoder and the decoder [R, 1], of the mean [n]."""
    encoder, decoder = maps.encoder.float().cpu(), maps.decoder.float().cpu()
    step, bits = maps.step.float().cpu(), maps.bits.cpu()
    # components have variance 1 and, if quantised, an error spread evenly over a step
    error = torch.where(bits > 8, _UNQUANTISED_ERROR["folded" if maps.mean is None else "coded"], step / 12**0.5)
    error = error.clamp_max(1.0).unsqueeze(1)
    mean_unit = None
    if maps.mean is not None:
        power = torch.zeros(maps.blocks.numel())  # of the error of each number
        numbers = maps.blocks.long().cpu()[maps.block.long().cpu()]
        power.scatter_add_(0, numbers.flatten(), (decoder * error).square().flatten())
        mean_unit = power.sqrt() + (_TINY if len(bits) else maps.mean.float().cpu().square().mean().sqrt())
    return {
        "encoder_unit": error * _row_size(encoder),
        "decoder_unit": error * _row_size(decoder),
        "mean_unit": mean_unit,
    }


def _row_size(rows: Tensor) -> Tensor:
    """Return the root mean square of every row: [R, 1]."""
    return rows.square().mean(1, keepdim=True).sqrt() + _TINY
