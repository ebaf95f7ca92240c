"""The model to be trained and its teacher: loaded as the run time loads them, then given trainable layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.calibration.sampling import sample_windows
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.errors import UnsupportedModelError
from kvcompress.evaluate.perplexity import Original, evaluate_attached
from kvcompress.evaluate.windows import Windows
from kvcompress.heal.attention import Switch, use_healing_attention, use_own_attention
from kvcompress.heal.distil import Distillation
from kvcompress.heal.head_norm import fit_head_norms
from kvcompress.heal.layers import TrainableLayer
from kvcompress.heal.options import HealOptions
from kvcompress.model.architectures import read_model_spec
from kvcompress.model.model_spec import PARTS, Site
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from kvcompress.runtime.attention import CODED
from kvcompress.runtime.head_norm import HEAD_NORM, HeadNorm, add_head_norm
from kvcompress.runtime.load import load
from kvcompress.runtime.output import read_output

#: Windows on which the weights of head norms are set before they are trained.
_NORM_WINDOWS = 4
#: Sequences that a model samples from itself side by side, at most: a step takes a GPU hardly longer for many.
_SAMPLED_AT_ONCE, _SAMPLED_ON_CPU = 8192, 64


@dataclass
class Student:
    """A compressed model with its run time attached, and the uncompressed one; of a coded output they are the same."""

    model: Any
    teacher: Any
    plan: Plan
    maps: dict[Site, SiteMaps]
    layers: list[TrainableLayer] = field(default_factory=list)

    @classmethod
    def of(cls, directory: Path, plan: Plan, source: Path, *, device: torch.device, dtype: torch.dtype) -> Student:
        """Return the model of an output, attached; dtype: of a coded one, where no weight is trained."""
        folded = plan.form == "folded"
        # weights that are trained are kept in float32: bfloat16 would round small steps away; autocast computes in it
        model = load(directory, base=source, dtype=torch.float32 if folded else dtype, device=str(device))
        teacher = model
        if folded:
            teacher = load_weights(source, dtype=torch.float32, device=device)
        return cls(model, teacher, plan, read_output(directory)[1])

    def figures(self, held_out: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return ({text: its figures}, their protocol), measured as `kvcompress eval` does, with the run time."""
        texts, protocol = {}, {}
        for text, ids in held_out.items():
            with torch.compiler.set_stance("force_eager"):  # a teacher whose layers were compiled for the training
                result = evaluate_attached(self.model, Original(self.teacher, Windows(ids, text, "")))
            texts[text] = {"ratio": result.perplexity["ratio"], "kl_nats": result.kl_nats}
            protocol = {k: v for k, v in result.protocol.items() if not k.startswith("text")}
        return texts, protocol

    def sampled(self, tokenizer: Any, n_windows: int, seq_len: int, *, seed: int) -> Tensor:
        """Return windows that the uncompressed model samples from itself: [n_windows, seq_len].

        In bfloat16 on a GPU; half of the sequences begin with any token, so that not all of an instructed model's text
        is chat.
        """
        coded = self.teacher is self.model
        if coded:
            detach(self.model)
        on_gpu = self.teacher.device.type == "cuda"
        speaker = in_bfloat16(self.teacher) if on_gpu else self.teacher
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            at_once = sequences_at_once(speaker, self.plan)
            ids = sample_windows(speaker, tokenizer, n_windows, seq_len, seed=seed, batch=at_once, anywhere=True)
        if coded:
            attach_plan(self.model, self.plan, self.maps)
        return ids

    def distillation(self, options: HealOptions, windows: Tensor) -> Distillation:
        """Return what the Trainer trains; the run time is detached. windows: text to set new head norms by."""
        self.layers = trainable_layers(self.model, self.plan, self.maps)
        if self.plan.form == "coded":
            return self._coded(options)
        detach(self.model)
        spec = read_model_spec(self.model.config.to_dict())
        paths = [a.projection("value").module.rpartition(".")[0] for a in spec.layers]
        modules = [self.model.get_submodule(path) for path in paths]
        switch = Switch(self.plan.sinks, self.plan.recent, True)
        norms: list[HeadNorm] = []
        if options.head_norm and not hasattr(modules[0], HEAD_NORM):
            sizes = zip(modules, spec.layers, strict=True)
            norms = [add_head_norm(module, n_heads=a.n_heads, head_dim=a.head_dim) for module, a in sizes]
        use_healing_attention(self.model, list(zip(modules, self.layers, strict=True)), switch)
        if norms:
            fit_head_norms(norms, self.model, windows[:_NORM_WINDOWS].to(self.model.device))
        if options.compile:
            compat.compile_layers(self.model)
            compat.compile_layers(self.teacher)
        trained = trained_parameters(self.model, paths, options.train)
        return Distillation(self.model, self.teacher, self.layers, switch, options, trained=trained, new_norms=norms)

    def _coded(self, options: HealOptions) -> Distillation:
        """Whatever the model: its attention modules are those that the run time tells what is in their cache."""
        by_number = dict(zip(layer_numbers(self.plan), self.layers, strict=True))
        readers = [(m, by_number[getattr(m, CODED)]) for m in self.model.modules() if hasattr(m, CODED)]
        if {id(layer) for _, layer in readers} != {id(layer) for layer in self.layers}:
            raise UnsupportedModelError(
                "this model's attention does not go through transformers' interface, so its maps cannot be trained yet."
            )
        detach(self.model)
        switch = Switch(self.plan.sinks, self.plan.recent, False)
        use_healing_attention(self.model, readers, switch)
        return Distillation(self.model, self.teacher, self.layers, switch, options, trained=[], new_norms=[])

    def trained_maps(self) -> dict[Site, SiteMaps]:
        """Return the maps as they are now."""
        found: dict[Site, SiteMaps] = {}
        for number, layer in zip(layer_numbers(self.plan), self.layers, strict=True):
            for part in PARTS:
                if (site := getattr(layer, part)) is not None:
                    found[Site(number, part)] = site.trained_maps()
        return found

    def trained_weights(self) -> dict[str, Tensor]:
        """Return the trained weights of the model by their names in a checkpoint; none of a coded output."""
        return {n: p.detach().cpu() for n, p in self.model.named_parameters() if p.requires_grad}

    def reload(self, directory: Path, source: Path) -> None:
        """Put what was written to a directory in the place of the trained model, with the run time attached."""
        if self.plan.form == "folded":
            device, dtype = self.model.device, self.model.dtype
            self.model.to("cpu")
            self.model = load(directory, base=source, dtype=dtype, device=str(device))
        else:
            use_own_attention(self.model)
            attach_plan(self.model.eval(), *read_output(directory))


def in_bfloat16(model: Any) -> Any:
    """Return a model whose weights, and with them its cache, are bfloat16: itself, or a copy of a float32 one.

    Autocast alone would keep rotated keys in float32 and cast all of them again for every token. Buffers stay: the
    frequencies of RoPE among them would suffer.
    """
    if model.dtype != torch.float32:
        return model
    speaker = copy.deepcopy(model)
    for parameter in speaker.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return speaker


def sequences_at_once(model: Any, plan: Plan) -> int:
    """Return how many sequences of 256 tokens a model samples side by side: on a GPU what a third of its free memory
    holds."""
    if model.device.type != "cuda":
        return _SAMPLED_ON_CPU
    cache = 256 * 2 * sum(site.width for site in plan.sites)
    logits = 16 * model.config.get_text_config().vocab_size  # of a step: as they come, as float32, as probabilities
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(_SAMPLED_AT_ONCE, free // 3 // (cache + logits)))


def trainable_layers(model: Any, plan: Plan, maps: dict[Site, SiteMaps]) -> list[TrainableLayer]:
    """Return a trainable layer for each layer of a model that a plan is attached to, on the model's device."""
    planned, layers = {site.site: site for site in plan.sites}, []
    for number, codec in zip(layer_numbers(plan), attachment_of(model).codecs, strict=True):
        plans = {part: planned[Site(number, part)] for part in PARTS}
        found = {part: None if p.exact else maps[p.site] for part, p in plans.items()}
        layers.append(TrainableLayer(codec, plans, found).to(model.device))
    return layers


def layer_numbers(plan: Plan) -> list[int]:
    """Return the numbers of the layers that have a cache, rising, as the run time keeps its codecs."""
    return sorted({site.site.layer for site in plan.sites})


def trained_parameters(model: Any, attentions: list[str], train: str) -> list[str]:
    """Return the names of a folded model's parameters that are trained beside its maps.

    maps: norms of head outputs alone. attention: the projections of the attention and all norms. all: everything.
    """

    def wanted(name: str) -> bool:
        if train == "all" or f".{HEAD_NORM}." in name:
            return True
        is_norm = "norm" in name.rsplit(".", 2)[-2]
        return train == "attention" and (is_norm or name.rsplit(".", 2)[0] in attentions)

    return [name for name, _ in model.named_parameters() if wanted(name)]
