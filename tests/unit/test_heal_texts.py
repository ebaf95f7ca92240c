"""Text sources -> windows to train on: equal shares, short texts again and again, and what is kept out of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress.heal.student import in_bfloat16, sequences_at_once
from kvcompress.heal.texts import HealTexts, heal_texts

SEQ_LEN = 10


class Words:
    """A tokenizer of one token a word, its number: so that it can be seen which windows were taken."""

    eos_token_id = None
    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def cut(tmp_path: Path) -> Any:
    """cut(windows of every source, tokens): what heal_texts makes of sources of so many windows, two of each kept out.

    The words of source k are 100000 + 1000 k and the numbers after it.
    """

    def make(sizes: list[int], n_windows: int) -> HealTexts:
        files = []
        for number, size in enumerate(sizes):
            files.append(tmp_path / f"{number}.txt")
            words = (str(100_000 + 1000 * number + i) for i in range(size * SEQ_LEN))
            files[-1].write_text(" ".join(words), encoding="utf-8")
        names = tuple(str(file) for file in files)
        return heal_texts(Words(), names, tokens=n_windows * SEQ_LEN, seq_len=SEQ_LEN, held_out=2)

    return make


def counts(texts: HealTexts, n_sources: int) -> list[int]:
    first = [(int(window[0]) - 100_000) // 1000 for window in texts.training]
    return [first.count(source) for source in range(n_sources)]


def test_a_short_text_has_its_share_by_up_to_four_passes(cut: Any) -> None:
    texts = cut([60, 5], 30)  # 58 windows and 3 to train on
    assert counts(texts, 2) == [18, 12]
    again = [int(w[0]) for w in texts.training if int(w[0]) >= 101_000]
    assert sorted(again.count(first) for first in set(again)) == [4, 4, 4]
    assert len({int(w[0]) for w in texts.training if int(w[0]) < 101_000}) == 18  # of a long one no window twice


def test_a_pass_that_is_not_whole_is_spread_over_the_text(cut: Any) -> None:
    texts = cut([60, 12], 30)
    assert counts(texts, 2) == [15, 15]
    again = [int(w[0]) for w in texts.training if int(w[0]) >= 101_000]
    assert sorted(again.count(first) for first in set(again)) == [1] * 5 + [2] * 5


def test_no_training_window_is_kept_out(cut: Any) -> None:
    texts = cut([9, 40], 60)
    out = {int(w[0]) for windows in texts.held_out.values() for w in windows}
    assert len(out) == 4 and not out & {int(w[0]) for w in texts.training}


def test_chats_are_worded_by_the_models_template(tmp_path: Path) -> None:
    class Chat(Words):
        chat_template = "numbers"

        def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
            return " ".join(f"7 {message['content']} 8" for message in messages)

    chats = tmp_path / "chats.jsonl"
    record = json.dumps({"messages": [{"role": "user", "content": "1 2 3"}, {"role": "assistant", "content": "4 5 6"}]})
    chats.write_text((record + "\n") * 10, encoding="utf-8")
    texts = heal_texts(Chat(), (str(chats),), tokens=5 * SEQ_LEN, seq_len=SEQ_LEN, held_out=2)
    assert texts.training.tolist() == [[7, 1, 2, 3, 8, 7, 4, 5, 6, 8]] * 5


@pytest.mark.parametrize(
    ("free", "sequences"),
    [(3 * 10 * (256 * 2 * 64 + 16 * 100), 10), (1 << 50, 8192), (1000, 1)],
    ids=["a third of what is free", "never more than these", "a full card"],
)
def test_a_card_samples_as_many_sequences_as_a_third_of_its_memory_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, sequences: int
) -> None:
    """Two sites of 32 numbers in bfloat16, 256 tokens of each sequence, and a step's logits."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 60))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))
    plan: Any = SimpleNamespace(sites=[SimpleNamespace(width=32)] * 2)
    assert sequences_at_once(SimpleNamespace(device=torch.device("cuda", 0), config=config), plan) == sequences
    assert sequences_at_once(SimpleNamespace(device=torch.device("cpu")), plan) == 64


def test_a_copy_in_bfloat16_speaks_and_keeps_its_keys_so(tiny_checkpoint: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama-gqa"), dtype=torch.float32).eval()
    speaker = in_bfloat16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the teacher stays as it was
    assert {b.dtype for b in speaker.buffers()} == {torch.float32}  # RoPE's frequencies
    with torch.no_grad():
        made = speaker(input_ids=torch.arange(8)[None], use_cache=True)
        told = model(input_ids=torch.arange(8)[None])
    assert made.past_key_values.layers[0].keys.dtype == torch.bfloat16
    assert (made.logits.float() - told.logits).abs().max() < 0.05 * told.logits.abs().max()
    assert in_bfloat16(speaker) is speaker
