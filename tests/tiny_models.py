"""Tiny seeded models of every supported family, saved as real checkpoints with a tokenizer of their own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
PAD, BOS, EOS = 0, 1, 2

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Far wider than a trained model's, so that attention is sharp and the next token is not a tie.
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """A config class of transformers, what it adds to the common sizes, and how the checkpoint is stored."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """Return a seeded model whose biases and norm weights are not trivial."""
        config = getattr(transformers, self.config)(**{**_COMMON, **self.fields, **changes})
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.data.normal_(0, 0.5, generator=generator)
            elif "norm" in name:
                parameter.data.uniform_(0.5, 1.5, generator=generator)
        return model.to(self.dtype).eval()


FAMILIES = {
    "llama-mha": Family("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-gqa": Family("LlamaConfig"),
    "llama-mqa": Family("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-bias": Family("LlamaConfig", {"attention_bias": True}),
    "llama-tied": Family("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-sharded": Family("LlamaConfig", shard_size="40KB"),
    "llama-bf16": Family("LlamaConfig", dtype=torch.bfloat16),
    "llama-yarn": Family("LlamaConfig", {"rope_parameters": _YARN}),
    "llama-llama3": Family("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "mistral": Family("MistralConfig", {"sliding_window": None, "head_dim": 8}),
    "mistral-sliding": Family("MistralConfig", {"sliding_window": 12, "head_dim": 8}),
    "qwen2": Family("Qwen2Config", {"use_sliding_window": False}),
    "qwen3": Family("Qwen3Config", {"head_dim": 16}),  # heads wider than hidden_size / n_heads, as in the real ones
    "phi3": Family("Phi3Config"),
    "phi3-partial": Family(
        "Phi3Config",
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "smollm3": Family("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
}

_TEXT = """
the of and a to in is was that it for on with as by at from his they be this had are but not have which one
river stone paper light winter garden engine letter number market silver window morning question answer music
carried turned asked found wrote opened counted followed measured remembered painted folded crossed
"""
_WORDS = _TEXT.split()


def prose(n_words: int, seed: int = 0) -> str:
    """Return seeded sentences of a small vocabulary: enough structure for a tokenizer to learn from."""
    rng = random.Random(seed)
    words, sentences = [], []
    for _ in range(n_words):
        words.append(rng.choices(_WORDS, weights=[1 / (i + 2) for i in range(len(_WORDS))])[0])
        if len(words) > 4 and rng.random() < 0.15:
            sentences.append(" ".join(words).capitalize() + ".")
            words = []
    return " ".join([*sentences, " ".join(words)])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `prose`, so that it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose(2000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def save_tiny_checkpoint(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model and the tokenizer; `changes` are config fields on top of the family's."""
    spec = FAMILIES[family]
    spec.build(seed, **changes).save_pretrained(directory, max_shard_size=spec.shard_size)
    build_tokenizer().save_pretrained(directory)
    return directory


def random_ids(n_rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return seeded token ids [n_rows, n_tokens] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_rows, n_tokens), generator=generator)
