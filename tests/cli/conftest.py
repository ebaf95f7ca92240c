"""A tiny seeded model with its own tokenizer, compressed once in each form, and the app run in this process."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress_cli.app import app

logging.disable_progress_bar()
WORDS = ["the", "sea", "was", "calm", "and", "old", "ships", "lay", "in", "bays", "while", "boys", "read", "books"]


class Outcome(NamedTuple):
    """How a run of the app ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def kvcompress(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """kvcompress("report", OUT): the outcome of a command line; a bug's exception passes through."""

    def run(*args: Any) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            app([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def fails(kvcompress: Callable[..., Outcome]) -> Callable[..., str]:
    """fails("report", OUT): the one line on stderr of a command line that must fail with 2 and print nothing else."""

    def run(*args: Any) -> str:
        outcome = kvcompress(*args)
        assert outcome.code == 2
        assert outcome.stdout == ""
        assert outcome.stderr.count("\n") == 1 and outcome.stderr.endswith("\n")
        return outcome.stderr

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of seeded words, some thousand tokens long."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(rng.choice(WORDS) for _ in range(4000)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 llama checkpoint: 4 layers, 4 query and 2 KV heads of 16. Never written to."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,  # large enough that attention is far from uniform, so that its loss shows
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Callable[..., Path]:
    """compressed(keep=0.75): an output of the library with these options on top of small ones, made once."""
    made: dict[str, Path] = {}
    directory = tmp_path_factory.mktemp("compressed")

    def make(**choices: Any) -> Path:
        key = repr(sorted(choices.items()))
        if key not in made:
            small = {"keep": 0.5, "tokens": 512, "seq_len": 64, "sinks": 2, "recent": 8, "calibration": (str(text),)}
            output = directory / str(len(made))
            compress(model, output, CompressOptions(**(small | choices)))
            made[key] = output
        return made[key]

    return make


FOLDED = {"folded": True, "key_basis": "head", "value_basis": "head", "policy": "uniform"}
FORMS = {"coded": {}, "maps_only": {"maps_only": True}, "folded": FOLDED}


@pytest.fixture(params=FORMS)
def any_form(request: pytest.FixtureRequest, compressed: Callable[..., Path]) -> Path:
    """An output of each form in turn."""
    return compressed(**FORMS[request.param])
