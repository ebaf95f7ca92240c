"""What running a model shows of it: sites, sizes, readers, and the rotation of keys, proven."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.errors import UnsupportedModelError
from kvcompress.model.head import after_layers, logits_of
from kvcompress.model.model_spec import ModelSpec, Site
from kvcompress.model.probe import matched, probe, turned_otherwise
from kvcompress.model.proof import FrequencyTable, Keys, prove_rotation
from kvcompress.model.recording import Update
from kvcompress.model.rope import Rotary
from kvcompress.model.rotation import Rotation
from tests.models.small import EARLIER, needs, small_model
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-sharded"])
def test_it_finds_what_the_readers_read(tiny_checkpoint: Any, tiny_model: Any, family: str) -> None:
    from kvcompress.checkpoint.reader import open_checkpoint

    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        read = checkpoint.spec
    found = probe(tiny_model(family))
    assert matched(found, read) is found
    assert found.own_layers == read.own_layers
    assert found.cache_numbers_per_token == read.cache_numbers_per_token
    for ours, theirs in zip(found.layers, read.layers, strict=True):
        assert ours.n_heads == theirs.n_heads and ours.rotary_dim == theirs.rotary_dim
        assert len(ours.readers) == 1
    rotary = Rotary.of_checkpoint(tiny_checkpoint(family))
    for site, rotation in found.rotations.items():
        assert site.part == "key" and rotation.scale == rotary.scale
        assert rotation.frequencies == tuple(rotary.inv_freq.tolist())


@pytest.mark.parametrize(
    ("model_type", "site", "width", "start", "interleaved"),
    [
        ("cohere", Site(0, "key"), 16, 0, True),
        ("glm", Site(0, "key"), 8, 0, True),
        ("gpt_neox", Site(3, "key"), 4, 0, False),
        ("deepseek_v2", Site(1, "value"), 8, 0, True),  # latent attention caches its rotated part as "values"
        ("falcon", Site(0, "key"), 16, 0, False),
        ("gemma3_text", Site(1, "key"), 16, 0, False),
    ],
)
def test_rotations_of_many_layouts(model_type: str, site: Site, width: int, start: int, interleaved: bool) -> None:
    if model_type == "deepseek_v2":
        caches_latents()
    rotation = probe(small_model(model_type)).rotations[site]
    assert (rotation.width, rotation.start, rotation.interleaved) == (width, start, interleaved)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "mpt", "afmoe"])  # learned, ALiBi, none
def test_keys_that_do_not_turn(model_type: str) -> None:
    assert not probe(small_model(model_type)).rotations


def test_layers_of_their_own() -> None:
    needs("qwen3_5_text")
    hybrid, windows = probe(small_model("qwen3_5_text")), probe(small_model("gemma3_text"))
    assert [a.layer for a in hybrid.layers] == [1, 3] and all(o.state_bytes > 0 for o in hybrid.own_layers)
    assert [o.window for o in windows.own_layers] == [16, 16]
    numbers = windows.own_layers[0].numbers
    assert numbers == 2 * windows.layers[0].width
    assert windows.own_bytes(8) == 2 * 8 * numbers * 4 and windows.own_bytes(1000) == 2 * 15 * numbers * 4


def caches_latents() -> None:
    if EARLIER:
        pytest.skip("latent attention caches what is expanded from its latent, as any other")


@pytest.mark.parametrize("at_once", [False, True])
def test_experts_in_16_bits(at_once: bool) -> None:
    """What a router sees is rounded otherwise at each position: another expert, and later layers are others."""
    needs("gpt_oss")
    model = in_bfloat16(small_model("gpt_oss"))
    assert len(probe(model, at_once=at_once).rotations) == 2
    assert turned_otherwise(model, probe(model)) is None


def test_pairs_that_hardly_turn_in_16_bits() -> None:
    """Interleaved, a range without the slowest pairs explains as much as the whole one: the model's own is taken."""
    rotation = probe(in_bfloat16(small_model("ernie4_5"))).rotations[Site(1, "key")]
    assert (rotation.width, rotation.interleaved) == (16, True)


def in_bfloat16(model: Any) -> Any:
    """As checkpoints are loaded: frequencies stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def test_latent_attention_is_a_site() -> None:
    caches_latents()
    spec = probe(small_model("deepseek_v3"))
    key, value = (spec.attention(Site(0, part)) for part in ("key", "value"))
    assert (key.n_kv_heads, key.head_dim, key.rotation) == (1, 32, None)  # the latent
    assert (value.n_kv_heads, value.head_dim, value.rotary_dim) == (1, 8, 8)
    assert not spec.layers[0].readers  # attention works on what is expanded from it


def test_no_cache_that_grows() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        probe(small_model("mamba"))


def test_rotation_that_depends_on_the_length_is_refused() -> None:
    model = small_model("llama")
    embedding = model.get_decoder().rotary_emb
    own = embedding.forward

    def stretched(x: Any, position_ids: Any) -> Any:
        return own(x, position_ids * (1 + (position_ids.max() > 100)))

    embedding.forward = stretched
    with pytest.raises(UnsupportedModelError, match="layer 0: keys change with the position"):
        probe(model)


def test_frequencies_that_no_buffer_holds_are_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 2, 1, 16, generator=generator)
    rotation = Rotation(tuple((10000.0 ** -(torch.arange(6) / 6)).tolist()), 4, True)
    keys = positions_of(base, rotation)
    found = prove_rotation(keys, 0, "key", candidates=[FrequencyTable(torch.rand(6))])
    assert found is not None and (found.start, found.interleaved) == (4, True)
    assert torch.allclose(torch.tensor(found.frequencies), torch.tensor(rotation.frequencies), rtol=1e-3, atol=1e-7)


def positions_of(base: torch.Tensor, rotation: Rotation) -> Keys:
    def at(position: int) -> dict[int, Update]:
        positions = torch.full((len(base), 1), position)
        return {0: Update(Rotary.by(rotation).rotate(base, positions), base)}

    return Keys(at(0), {p: at(p) for p in (1, 4, 16, 64, 256, 1024, 2047)})


def test_the_head_is_the_models_own() -> None:
    for model_type in ("gemma2", "cohere", "opt", "llama"):  # soft cap, scale, projection, none
        model = small_model(model_type)
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]
            assert torch.allclose(logits_of(model, hidden), model(input_ids=ids).logits, atol=1e-5)
            assert "forward" not in model.get_decoder().__dict__


def test_another_model_is_not_matched() -> None:
    ours, theirs = probe(small_model("llama")), probe(small_model("llama", num_key_value_heads=4))
    with pytest.raises(UnsupportedModelError, match=r"layers.0.key: config.json says .* \(4, 16\)"):
        matched(ours, theirs)
    assert isinstance(ours, ModelSpec) and after_layers is not None


def test_layers_in_loops_are_refused() -> None:
    """Two layers that share one's attention both write to its layer of the cache."""
    model: Any = small_model("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedModelError, match="of layer 0 to its cache more than once for a token"):
        probe(model, prove=False)
