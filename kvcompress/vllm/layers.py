"""An attention layer whose cache is packed: vLLM's Attention with our pages, and a second cache beside it for exact
ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.errors import CheckpointError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.model.architectures import is_read, read_model_spec
from kvcompress.model.model_spec import DTYPE_BYTES, PARTS, Site
from kvcompress.model.rope import Rotary
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.runtime.layers import check_fit
from kvcompress.site_plan import SitePlan
from kvcompress.vllm import refusals
from kvcompress.vllm.codecs import heads_of, make_layer_codecs, rank_heads, rank_site
from kvcompress.vllm.fused import FusedModel
from kvcompress.vllm.names import AttentionLayerBase, VllmConfig, sum_over_ranks, tensor_parallel_place
from kvcompress.vllm.pages import PageLayout, blocks_of_page, page_sizes, row_bytes
from kvcompress.vllm.reference import LayerCache
from kvcompress.vllm.source import UNCOMPRESSED, Source
from kvcompress.vllm.specs import ExactSpec, PackedSpec
from kvcompress.vllm.steps import encoding_lag

#: What is appended to a layer's name for its exact pages.
EXACT_SUFFIX = ".exact"


@dataclass(slots=True)
class CompressedModel:
    """What all compressed layers of a loaded model share.

    rotaries: of the layers whose keys turn. sites: what this rank keeps of each site, and its maps. layouts: of each
    layer's packed page; page_bytes: its size, the same on all ranks. shared: sites whose codes other ranks hold a part
    of, so that gains are chosen together. packed_table: that of the step, int32 [n, most pages]. slow: why all ranks
    attend in the reference, None if they do not; not known before `agree`.
    """

    source: Source
    rotaries: dict[int, Rotary]
    sites: dict[Site, tuple[SitePlan, SiteMaps | None]]
    layouts: dict[int, PageLayout]
    page_bytes: dict[int, int]
    shared: frozenset[Site] = frozenset()
    packed_table: Tensor | None = None
    fused: FusedModel | None = None
    slow: str | None = None
    agreed: bool = False

    @classmethod
    def of(cls, source: Source, config: VllmConfig) -> CompressedModel:
        """Raises CheckpointError for maps of another model, OptionError where heads cannot be shared out as ranks
        are."""
        plan, head_dim = source.plan, config.model_config.get_head_size()
        turning = rotaries(plan, config.model_config.hf_text_config)
        rank, n_ranks = tensor_parallel_place()
        sites: dict[Site, tuple[SitePlan, SiteMaps | None]] = {}
        own, largest, shared = dict[Site, int](), dict[Site, int](), set[Site]()
        number_bytes = DTYPE_BYTES[str(config.model_config.dtype).removeprefix("torch.")]
        for site in plan.sites:
            cut = []
            for r in range(n_ranks):
                heads = rank_heads(site.width // head_dim, r, n_ranks)
                maps = None if site.exact else source.maps[site.site]
                mine = None if maps is None else heads_of(maps, *heads, head_dim, site=site.site)
                cut.append((rank_site(site, mine, (heads[1] - heads[0]) * head_dim), mine))
            if n_ranks > 1 and site.width > head_dim and any(b <= 8 for s, maps in cut if maps for b, _ in s.bits):
                shared.add(site.site)
            rows = [row_bytes(s, number_bytes) for s, _ in cut]
            sites[site.site], own[site.site], largest[site.site] = cut[rank], rows[rank], max(rows)
        # Heads differ in their bits, and so do ranks in their rows; but vLLM gives all ranks pages of one size.
        layouts, common = layouts_of(plan, own), layouts_of(plan, largest)
        return cls(source, turning, sites, layouts, page_sizes(common), frozenset(shared))

    def agree(self, slow: str | None, device: torch.device) -> str | None:
        """Return why all ranks attend in the reference, None if none has to; slow: this rank's own reason.

        They choose gains together, and so must all encode the same blocks at once. The first call asks the others.
        """
        if not self.agreed:
            self.slow = slow
            if self.shared:
                n_slow = sum_over_ranks(torch.full((4,), float(slow is not None), device=device))
                if slow is None and float(n_slow[0]) > 0:
                    self.slow = "another rank has to, and says why in its own log"
            self.agreed = True
        return self.slow


def layouts_of(plan: Plan, rows: Mapping[Site, int]) -> dict[int, PageLayout]:
    """Return each layer's packed page, of rows of so many bytes."""
    n_blocks = blocks_of_page(plan)
    return {s.layer: PageLayout(n_blocks, *(rows[Site(s.layer, part)] for part in PARTS)) for s in plan.sites}


def rotaries(plan: Plan, hf_config: Any) -> dict[int, Rotary]:
    """Return RoPE of each layer whose keys turn: as the plan says, or in an earlier output, as the model has it.

    Raises CheckpointError for a plan of another model, OptionError for a model that is not run compressed.
    """
    as_read = hf_config.to_dict()
    refusals.refuse(refusals.of_config(as_read, plan.own_layers), UNCOMPRESSED)
    by = [Rotary.by(rotation) for rotation in plan.rotations]
    planned = {s.layer: by[s.rotation] for s in plan.sites if s.part == "key" and s.rotation is not None}
    if not is_read(as_read):
        n_layers = len({s.layer for s in plan.sites} | {own.layer for own in plan.own_layers})
        if plan.architecture != hf_config.model_type or n_layers != hf_config.num_hidden_layers:
            raise CheckpointError(
                f"the maps were made for a {plan.architecture} model with {n_layers} layers; this is a "
                f"{hf_config.model_type} model with {hf_config.num_hidden_layers}. Attach them to their own model."
            )
        return planned
    spec = read_model_spec(as_read)
    check_fit(spec, plan)
    turning = [a.layer for a in spec.layers if a.rotary_dim]
    shared = Rotary.of_config(hf_config) if turning else None
    if shared is None or not plan.rotations:
        return {layer: shared for layer in turning if shared is not None}
    if sorted(planned) != turning or not all(same_turn(rotary, shared) for rotary in planned.values()):
        raise CheckpointError(
            "the model turns its keys with the position in another way than the model that the maps were made for "
            "(other RoPE settings in config.json?). Attach them to their own model."
        )
    return planned


def same_turn(one: Rotary, other: Rotary) -> bool:
    """Return whether two turn keys alike, but for rounding."""
    sizes = len(one.inv_freq) == len(other.inv_freq) and abs(one.scale - other.scale) < 1e-3
    return sizes and torch.allclose(one.inv_freq.cpu(), other.inv_freq.cpu(), rtol=1e-3, atol=1e-9)


@dataclass(slots=True)
class CompressedAttention:
    """What an Attention layer of vLLM has beside its own fields so that its cache is packed."""

    model: CompressedModel
    layout: PageLayout
    page_bytes: int
    codecs: LayerKernels
    exact: ExactCache

    def cache(self, packed: Tensor) -> LayerCache:
        """packed: what vLLM bound as the layer's cache, uint8 [n_pages, 1, 1, bytes]."""
        return LayerCache(self.codecs, self.layout, packed[:, 0, 0], self.exact.kv_cache, self.model.source.plan.sinks)

    @property
    def device(self) -> torch.device:
        """Where the layer's codecs are: where it runs."""
        codec = self.codecs.key or self.codecs.value
        return torch.device("cpu") if codec is None else codec.encoder.device

    def packed_spec(self, config: VllmConfig) -> PackedSpec:
        return PackedSpec(
            block_size=self.layout.n_tokens,
            num_kv_heads=self.codecs.n_kv_heads,
            head_size=self.codecs.head_dim,
            dtype=torch.uint8,
            num_head_slots=1,
            tokens_per_state=self.layout.n_tokens,
            state_content_bytes=self.page_bytes,
            most_queries=(most_queries := 1 + config.num_speculative_tokens),
            lag=encoding_lag(self.model.source.plan.recent, most_queries),
        )


class ExactCache(nn.Module, AttentionLayerBase):
    """The pages of a layer's exact tokens, as vLLM sees them: a layer that holds a cache and computes nothing."""

    #: Called with the pages once there are any.
    when_bound: Callable[[Tensor], None] | None = None

    def __init__(self, backend: Any, spec: ExactSpec, name: str) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])
        self.name, self.spec, self._backend = name, spec, backend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        if self.when_bound is not None:
            self.when_bound(kv_cache)

    def get_attn_backend(self) -> Any:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactSpec:
        return self.spec


def make_layer(
    model: CompressedModel, layer: int, attention: Any, *, backend: Any, dtype: torch.dtype, device: torch.device
) -> CompressedAttention:
    """Return what a layer of vLLM needs to be compressed.

    attention: the layer, number `layer` of the model; backend: of its exact pages; dtype: of its keys and values.
    Codecs are made on the device on which vLLM is just making its layers. Raises CheckpointError for maps of another
    model.
    """
    n_heads, head_dim = attention.num_kv_heads, attention.head_size
    sites = {part: model.sites[Site(layer, part)] for part in PARTS}
    codecs = make_layer_codecs(
        {part: sites[part][0] for part in PARTS},
        {part: sites[part][1] for part in PARTS},
        rotary=model.rotaries.get(layer),
        n_kv_heads=n_heads,
        head_dim=head_dim,
        device=device,
    )
    for codec, part in zip((codecs.key, codecs.value), PARTS, strict=True):
        if codec is not None and Site(layer, part) in model.shared:
            codec.sum_over_ranks = sum_over_ranks
    spec = ExactSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=n_heads,
        head_size=head_dim,
        dtype=dtype,
        sinks=model.source.plan.sinks,
        recent=model.source.plan.recent,
    )
    exact = ExactCache(backend, spec, attention.layer_name + EXACT_SUFFIX)
    return CompressedAttention(model, model.layouts[layer], model.page_bytes[layer], codecs, exact)
