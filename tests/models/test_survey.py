"""A slice of the survey of all types, and the real configurations in small; KVCOMPRESS_MODELS=all runs every type."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress.errors import UnsupportedModelError
from kvcompress.model.model_spec import Site
from kvcompress.model.probe import probe
from tests.models.page import page, with_newer
from tests.models.real import REAL, real_small
from tests.models.small import causal_types, needs, small_model
from tests.models.survey import Finding, survey

#: One of each kind: soft caps and windows, sinks as parameters and experts, linear attention beside full, latent
#: attention, ALiBi in an older file, learned positions, interleaved pairs.
SLICE = ("gemma2", "gpt_oss", "qwen3_5_text", "deepseek_v3", "bloom", "gpt2", "cohere")
#: Types that this version does not run, with what it says of them.
REFUSED = {"mamba": ("takes no cache of keys and values", "there is nothing to compress")}  # since 5.24 it has a state
#: Its state stays in its modules, so a text of one token continues the one before; seen as such in float32 alone.
REFUSED_IN_16_BITS = ("recurrent_gemma",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", causal_types() if os.environ.get("KVCOMPRESS_MODELS") == "all" else SLICE)
def test_type(model_type: str, tmp_path: Path) -> None:
    needs(model_type)
    finding = survey(model_type, tmp_path)
    if os.environ.get("KVCOMPRESS_MODELS") == "all" and finding.status in ("no model", "refused"):
        pytest.skip(f"{finding.status}: {finding.reason}")
    assert finding.status == "passes", finding.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", causal_types() if os.environ.get("KVCOMPRESS_MODELS") == "all" else SLICE)
def test_rotations_in_16_bits(model_type: str, tmp_path: Path) -> None:
    """Rounding hides no rotation that is seen in float32, and makes none up."""
    needs(model_type)
    try:
        model = small_model(model_type)
        found = rotations(model)
        model.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    except Exception as error:  # what the survey calls refused, or no model
        pytest.skip(str(error))
    if model_type in REFUSED_IN_16_BITS:
        with pytest.raises(UnsupportedModelError, match="no rotation explains it"):
            rotations(half)
    else:
        assert rotations(half) == found


def rotations(model: Any) -> dict[Site, tuple[int, int, bool]]:
    return {site: (r.width, r.start, r.interleaved) for site, r in probe(model).rotations.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    finding = survey(model_type, tmp_path)
    assert finding.status == "refused" and "\n" not in finding.reason
    assert any(reason in finding.reason for reason in REFUSED[model_type])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_real_configurations_in_small(name: str, tmp_path: Path) -> None:
    model_type, changes, n_sites = REAL[name]
    needs(model_type)
    finding = survey(model_type, tmp_path, **changes)
    assert finding.status == "passes", finding.reason
    assert finding.layers["compressed"] == n_sites
    assert real_small(name).config.model_type == model_type


def test_the_page_tells_each_type_once() -> None:
    passed = Finding("llama", "passes", layers={"DynamicSlidingWindowLayer": 3, "compressed": 1}, sites="32 + 32")
    told = page([vars(Finding("llama", "fails", "x")), vars(passed), vars(Finding("mamba", "refused", "no cache"))])
    assert "Of 2 types: 1 passes, 1 refused." in told
    assert "| llama | passes | 1 (+ 3 window) | 32 + 32 |  |  |  |" in told and "| mamba | refused |" in told
    for _ in range(2):  # the second in place of the first
        told = with_newer(told, [vars(Finding("dory", "refused", "loops"))])
    assert (
        told.count("## transformers") == 1 and told.count("| dory | refused |") == 1 and "| mamba | refused |" in told
    )
