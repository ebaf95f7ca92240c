"""What transformers renames: every name of the span, and bounds that are stated once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from kvcompress import compat
from kvcompress.compat import CACHE_NAMES, NEWEST, OLDEST, ForwardArguments
from kvcompress.errors import AttachmentError


class NewNames(nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> None: ...


class OldNames(nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **_: Any) -> None: ...


class NoCache(nn.Module):
    def forward(self, input_ids: Any) -> None: ...


def test_the_package_accepts_what_was_tested() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    bounds = next(r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    assert f"{OLDEST}.0" in bounds and f"{NEWEST}.99" in bounds
    major, minor = NEWEST.split(".")
    assert f"{major}.{int(minor) + 1}.0" not in bounds and "4.99" not in bounds
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text().split("transformers==")[1].split()[0]
    assert pinned in bounds


def test_this_transformers_is_known() -> None:
    """Fails on the day when a newer one comes: then run tests/versions, and raise NEWEST and the bound."""
    installed = Version(transformers.__version__)
    assert Version(OLDEST) <= installed and (installed.major, installed.minor) <= tuple(map(int, NEWEST.split(".")))


@pytest.mark.parametrize(("model", "name"), [(NewNames(), "cache"), (OldNames(), "past_key_values")])
def test_a_cache_is_found_and_given_under_every_name(model: nn.Module, name: str) -> None:
    names, cache, other = ForwardArguments.of(model), object(), object()
    assert names.cache == name and compat.cache_argument(model, cache) == {name: cache}
    for given in CACHE_NAMES:  # the alias of another release, too
        assert names.get_cache((1,), {given: cache}) is cache
        assert names.with_cache((1,), {given: cache, "x": 2}, other) == ((1,), {name: other, "x": 2})
    assert names.get_cache((1, None, cache), {}) is cache
    assert names.with_cache((1, None, cache), {"x": 2}, other) == ((1, None, other), {"x": 2})
    assert names.get_cache((1,), {name: None}) is None


def test_a_forward_without_a_cache_is_refused() -> None:
    with pytest.raises(AttachmentError, match="NoCache takes no cache"):
        ForwardArguments.of(NoCache())


def test_the_names_of_this_release(tiny_model: Any) -> None:
    model = tiny_model("llama-gqa")
    output = model(torch.tensor([[5, 6, 7]]), **compat.cache_argument(model, compat.DynamicCache()))
    assert isinstance(compat.cache_of(output), compat.DynamicCache)
    assert compat.cache_of(output).get_seq_length() == 3
    assert compat.cache_of(model(torch.tensor([[5]]), use_cache=False)) is None


def test_how_many_tokens_a_model_was_made_to_read(tiny_model: Any) -> None:
    assert compat.context_length(tiny_model("llama-gqa")) == 512
    alibi = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=1))
    assert compat.context_length(alibi) == 1 << 20


def test_numbers_of_queries() -> None:
    assert compat.n_queries(3) == compat.n_queries(torch.arange(7, 10)) == 3  # before 5.3: their positions


def test_how_many_tokens_may_come() -> None:
    config = GenerationConfig(max_length=50)
    assert compat.n_new_tokens({}, config, 30) == 20
    assert compat.n_new_tokens({"max_new_tokens": 7}, config, 30) == 7
    assert compat.n_new_tokens({"max_length": 90}, config, 30) == 60
    assert compat.n_new_tokens({}, GenerationConfig(max_new_tokens=5), 30) == 5


@pytest.mark.parametrize(("is_causal", "reads_cache"), [(True, False), (False, False), (False, True)])
def test_a_missing_mask_of_eager_attention(is_causal: bool, reads_cache: bool) -> None:
    """Over a cache it is causal (decoders of BigBird-Pegasus say that they are not); elsewhere the module knows."""
    module = LlamaAttention(LlamaConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=2), 0).eval()
    module.is_causal = is_causal
    tensors = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = compat.exact_attention(module, "eager", *tensors, None, reads_cache=reads_cache, scaling=8**-0.5)
    attend = nn.functional.scaled_dot_product_attention
    expected = attend(*tensors, is_causal=is_causal or reads_cache).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
