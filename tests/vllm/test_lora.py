"""LoRA changes projections, not the cache: an adapter runs over compressed layers as over any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.vllm.conftest import greedy, new_tokens, prompts

RANK, SCALE = 4, 2.0


def adapter(model: Any, directory: Path) -> Path:
    """Write a LoRA of every query and value projection, and merge it into the model."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i, layer in enumerate(model.model.layers):
        for name in ("q_proj", "v_proj"):
            weight = layer.self_attn.get_submodule(name).weight
            down, up = (
                torch.randn(n, generator=generator) * 0.2 for n in ((RANK, weight.shape[1]), (len(weight), RANK))
            )
            prefix = f"base_model.model.model.layers.{i}.self_attn.{name}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
            weight.data += SCALE * up @ down
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}), encoding="utf-8")
    return directory


def test_an_adapter_over_compressed_layers(
    source: Path, full_rank: Path, engine: Any, plain: Any, tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    merged = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    lora = LoRARequest("adapter", 1, str(adapter(merged, tmp_path / "adapter")))
    llm = engine(full_rank, enable_lora=True, max_lora_rank=8)
    ids, sampling = prompts(150, 300), SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    inputs = [{"prompt_token_ids": x} for x in ids]
    with_lora = new_tokens(llm.generate(inputs, sampling, lora_request=lora, use_tqdm=False))
    assert with_lora == [greedy(merged, x, 30) for x in ids]
    # The same prompts without it share no pages with those.
    without = new_tokens(llm.generate(inputs, sampling, use_tqdm=False))
    assert without == [greedy(plain, x, 30) for x in ids]
    assert with_lora != without
