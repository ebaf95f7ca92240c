"""Latent attention trained on from several starts, at the same numbers a token and the same tokens of training.

    python recipes/measure_latent.py MODEL --text FILE [--text ...] --test FILE [--test ...] --tokens 2000000

Every start is a linear conversion of the model: keys and values of a token become a latent, from which attention
rebuilds them, the token's own included. Then all weights and both maps are trained by distillation.

    ours        keys before RoPE and values, each a latent of its own; Fisher information, ranks shared out by loss
    activation  the same with the principal components of keys and of values
    weights     the same with the SVD of the projections, data-free
    random      the same with random orthonormal encoders: latents that are learned from nothing, as in arXiv 2506.09342
    mha2mla     arXiv 2502.14837: a quarter of each head's RoPE pairs stay as they are, those of the largest
                |q| |k| (its 2-norm); the other keys lose RoPE and get one latent with the values, by the SVD of both
                projections together
    transmla    arXiv 2502.07864: heads are rotated at each frequency so that the first holds most; it alone keeps RoPE;
                the other keys and the values get one latent, the principal components of both, balanced

Departs from the papers: all are trained by distillation, at the same rates, from the same original; keys that keep RoPE
are encoded by the projections alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompress import compat
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.evaluate.windows import Windows
from kvcompress.heal.attention import Switch
from kvcompress.heal.distil import Distillation
from kvcompress.heal.layers import TrainableLayer
from kvcompress.heal.options import HealOptions
from kvcompress.heal.site import TrainableSite
from kvcompress.heal.student import trainable_layers
from kvcompress.heal.texts import HealTexts, heal_texts
from kvcompress.heal.trainer import device_name, make_trainer, training_arguments
from kvcompress.model.model_spec import PARTS
from kvcompress.model.rope import Rotary
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.attach import detach
from kvcompress.runtime.load import load
from kvcompress.runtime.output import read_output

OURS = {"ours": ("fisher", "loss"), "activation": ("activation", "uniform"), "weights": ("weights", "uniform")}
STARTS = (*OURS, "random", "mha2mla", "transmla")
Kinds = dict[str, Tensor]
_ATTENTION = "kvcompress_latent"
#: Of each head's pairs MHA2MLA leaves this share with RoPE.
_ROPE_SHARE = 4


@dataclass(frozen=True)
class Moments:
    """Of one layer: both: second moments of keys before RoPE and values together, [2 n, 2 n]; pairs: the mean of |q|
    times that of |k| of each RoPE pair, [heads, d / 2]."""

    both: Tensor
    pairs: Tensor


class SeparateLatents(nn.Module):
    """Keys before RoPE and values as latents of their own: what kvcompress calls `latent`."""

    def __init__(self, layer: TrainableLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, self.layer.seen_keys(key, positions), self.layer.seen_values(value)


class PartialRope(nn.Module):
    """Some directions of the keys keep RoPE; the others and the values are rebuilt from one latent, without it."""

    kept: Tensor

    def __init__(self, kept: Tensor, encoder: Tensor, decoder: Tensor, rotary: Rotary, head_dim: int) -> None:
        """kept: [n, n], a projection that commutes with RoPE; encoder, decoder: [R, 2 n]."""
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)
        self.rotary, self.head_dim, rank = rotary, head_dim, len(encoder)
        maps = SiteMaps(
            blocks=torch.arange(encoder.shape[1], dtype=torch.int32)[None],
            encoder=encoder,
            decoder=decoder,
            block=torch.zeros(rank, dtype=torch.int32),
            bits=torch.full((rank,), 16, dtype=torch.uint8),
            step=torch.ones(rank),
            mean=torch.zeros(encoder.shape[1]),
        )
        self.latent = TrainableSite(maps, head_dim=head_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys of twice the width: the part with RoPE, then that without; and values."""
        x, v = self._flat(self.rotary.unrotate(key.float(), positions)), self._flat(value.float())
        turned = x @ self.kept
        both, mean = torch.cat([x - turned, v], -1), self.latent.current_mean()
        plain, values = (self.latent(both - mean) + mean).chunk(2, -1)
        keys = torch.cat([self.rotary.rotate(self._heads(turned), positions), self._heads(plain)], -1)
        return torch.cat([query.float(), self.rotary.unrotate(query.float(), positions)], -1), keys, self._heads(values)

    def _flat(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def latent_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, with what the module's latents give back; without any the model's own."""
    kwargs["dropout"] = 0.0
    layer = module.__dict__.get("kvcompress_latent")
    if layer is not None:
        positions = torch.arange(key.shape[2], device=key.device)[None].expand(len(key), -1)
        kwargs["scaling"] = kwargs.get("scaling") or query.shape[-1] ** -0.5
        dtype = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (x.to(dtype) for x in layer(query, key, value, positions))
    return compat.sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0], None


def measured(model: Any, ids: Tensor) -> list[Moments]:
    """Return the moments of every layer over token ids [n_windows, seq_len]; the model's projections are llama's."""
    seen: dict[str, Tensor] = {}
    modules = [layer.self_attn for layer in model.get_decoder().layers]
    handles = [
        getattr(module, f"{part}_proj").register_forward_hook(
            lambda _m, _a, out, name=f"{index}{part}": seen.__setitem__(name, out.float())
        )
        for index, module in enumerate(modules)
        for part in "qkv"
    ]
    n, d = modules[0].k_proj.out_features, modules[0].head_dim
    sums = [[torch.zeros(2 * n, 2 * n), torch.zeros(n // d, d // 2)] for _ in modules]
    for window in ids.split(1):
        with torch.no_grad():
            model(input_ids=window.to(model.device), use_cache=False)
        for index, (both, pairs) in enumerate(sums):
            q, k, v = (seen[f"{index}{part}"].flatten(0, 1) for part in "qkv")
            x = torch.cat([k, v], -1)
            both += (x.T @ x / len(ids) / len(x)).cpu()
            q_norm, k_norm = (y.unflatten(-1, (-1, 2, d // 2)).norm(dim=2).mean(0) for y in (q, k))
            pairs += (q_norm.unflatten(0, (n // d, -1)).mean(1) * k_norm).cpu() / len(ids)
    for handle in handles:
        handle.remove()
    return [Moments(*pair) for pair in sums]


def mha2mla(module: Any, moments: Moments, numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kept, encoder, decoder) of arXiv 2502.14837, joint SVD, 2-norm, that caches `numbers` a token."""
    d = module.head_dim
    best = moments.pairs.topk(d // 2 // _ROPE_SHARE, -1).indices
    pairs = torch.zeros_like(moments.pairs).scatter_(1, best, 1.0)
    kept = torch.cat([pairs, pairs], -1).flatten()
    key, value = (p.weight.detach().float().cpu() for p in (module.k_proj, module.v_proj))
    u = torch.linalg.svd(torch.cat([key * (1 - kept)[:, None], value]), full_matrices=False).U
    rank = min(numbers - int(kept.sum()), u.shape[1])
    encoder = u[:, :rank].T.contiguous()
    return torch.diag(kept), encoder, encoder.clone()


def transmla(module: Any, moments: Moments, numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kept, encoder, decoder) of arXiv 2502.07864: one rotated head keeps RoPE, the rest is balanced PCA."""
    d, n = module.head_dim, module.k_proj.out_features
    by_channel = moments.both[:n, :n].unflatten(0, (-1, d)).unflatten(2, (-1, d))  # [heads, d, heads, d]
    kept = torch.zeros(n // d, d, n // d, d)
    for f in range(d // 2):
        channels = (f, f + d // 2)
        first = torch.linalg.eigh(sum(by_channel[:, c, :, c] for c in channels)).eigenvectors[:, -1]
        for c in channels:
            kept[:, c, :, c] = torch.outer(first, first)
    kept = kept.flatten(2).flatten(0, 1)
    off = torch.block_diag(torch.eye(n) - kept, torch.eye(n))
    rest = off @ moments.both @ off
    balance = (rest[:n, :n].trace() / rest[n:, n:].trace()).clamp_min(1e-6).sqrt()  # 0 where one head holds all
    scale = torch.cat([torch.full((n,), float(1 / balance)), torch.ones(n)])
    u = torch.linalg.eigh(scale[:, None] * rest * scale).eigenvectors.flip(1)[:, : max(numbers - d, 1)].T
    return kept, u * scale, u / scale


def random_latents(layer: TrainableLayer, seed: int) -> None:
    """Put random orthonormal encoders, and their transposes as decoders, in the place of a layer's own."""
    generator = torch.Generator().manual_seed(seed)
    for part in PARTS:
        site = getattr(layer, part)
        rows = torch.linalg.qr(torch.randn(site.encoder.shape[1], site.rank, generator=generator)).Q.T
        maps = SiteMaps(**{**vars(site.maps), "encoder": rows.contiguous(), "decoder": rows.clone()})
        setattr(layer, part, TrainableSite(maps, head_dim=site.head_dim))


def latents(start: str, model_dir: Path, args: argparse.Namespace, calibration: Tensor) -> tuple[Any, list[nn.Module]]:
    """Return (the model, its layers' latents) of a start."""
    if start in ("mha2mla", "transmla"):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(args.device)
        rotary, convert = Rotary.of(model), {"mha2mla": mha2mla, "transmla": transmla}[start]
        moments = measured(model, calibration)
        modules = [layer.self_attn for layer in model.get_decoder().layers]
        numbers = round(args.keep * 2 * modules[0].k_proj.out_features)
        made = [convert(m, x, numbers) for m, x in zip(modules, moments, strict=True)]
        return model, [PartialRope(*parts, rotary, modules[0].head_dim) for parts in made]
    n_kv_heads = AutoConfig.from_pretrained(model_dir).num_key_value_heads
    metric, policy = OURS.get(start, ("weights", "uniform"))
    with tempfile.TemporaryDirectory() as scratch:
        options = CompressOptions(
            keep=args.keep, ranks_only=True, metric=metric, policy=policy, sinks=0, recent=0, group=n_kv_heads,
            calibration=tuple(args.calibration), tokens=args.calibration_tokens, seq_len=args.seq_len,
        )  # fmt: skip
        compress(str(model_dir), Path(scratch) / "out", options)
        model = load(Path(scratch) / "out", dtype=torch.float32, device=args.device)
        plan, maps = read_output(Path(scratch) / "out")
    layers = trainable_layers(model, plan, maps)
    detach(model)
    if start == "random":
        for index, layer in enumerate(layers):
            random_latents(layer, index)
    return model, [SeparateLatents(layer) for layer in layers]


def trained(start: str, model_dir: Path, args: argparse.Namespace, texts: HealTexts, tests: Kinds) -> dict[str, Any]:
    """Return the figures of a start before and after training, on `tests`; the best weights are those by `texts`."""
    model, layers = latents(start, model_dir, args, spread(texts.training, args.calibration_tokens // args.seq_len))
    teacher = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(args.device).eval()
    compat.use_attention(model, _ATTENTION, latent_attention)
    for decoder, layer in zip(model.get_decoder().layers, layers, strict=True):
        decoder.self_attn.__dict__["kvcompress_latent"] = layer.to(model.device)
    options = HealOptions(
        train="all", text=tuple(args.text), tokens=args.tokens, seq_len=args.seq_len, batch=args.batch,
        device_batch=args.device_batch, learning_rate=args.learning_rate, maps_rate=args.maps_rate, evaluations=2,
        text_loss=0.0,
    )  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    model = Distillation(model, teacher, layers, Switch(0, 0, False), options, trained=names, new_norms=[])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(options, Path(scratch), device=args.device)
        trainer = make_trainer(model, texts, arguments, lambda _: None)
        before, began = _measured(trainer, tests), time.monotonic()
        trainer.train()
        seconds, after = round(time.monotonic() - began, 1), _measured(trainer, tests)
    run = {"start": start, "tokens": args.tokens, "seconds": seconds, "device": device_name(arguments)}
    return run | {"texts": _compared(before, after)}


def spread(windows: Tensor, n: int) -> Tensor:
    """Return n windows of all texts, which lie one after the other: evenly spaced, or all where there are fewer."""
    return windows[torch.linspace(0, len(windows) - 1, min(n, len(windows))).round().long()]


def _measured(trainer: Any, tests: Kinds) -> dict[str, dict[str, float]]:
    own, trainer.held_out = trainer.held_out, tests
    figures: dict[str, dict[str, float]] = trainer.measure()
    trainer.held_out = own
    return figures


def _compared(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, Any]:
    def shown(figures: dict[str, float]) -> dict[str, float]:
        ratio = float(torch.tensor(figures["nll_healed"] - figures["nll_original"]).exp())
        return {"ratio": ratio, "kl_nats": figures["kl"]}

    return {text: {"before": shown(before[text]), "after": shown(after[text])} for text in before}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", action="append", required=True, help="trained and calibrated on")
    parser.add_argument("--test", action="append", required=True, help="measured on")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--keep", type=float, default=0.3125, help="share of the cache that is left")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device-batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--maps-rate", type=float, default=0.02)
    parser.add_argument("--windows", type=int, default=12, help="of each test text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.calibration = args.text
    tokenizer = load_tokenizer(args.model)
    texts = heal_texts(tokenizer, tuple(args.text), tokens=args.tokens, seq_len=args.seq_len, held_out=1)
    tests = {Path(t).stem: Windows.of(tokenizer, t, args.seq_len, args.windows).ids for t in args.test}
    for start in args.starts:
        print(json.dumps(trained(start, args.model, args, texts, tests)), flush=True)


if __name__ == "__main__":
    main()
