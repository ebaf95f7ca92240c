"""`kvcompress generate`, on every form of output."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.compat import CACHE_NAMES, ForwardArguments
from kvcompress.plan import Plan
from kvcompress.runtime import attach, recording

PROMPT = "the sea was calm and the old ships"


def run(kvcompress, output, *flags, n_tokens=60):
    outcome = kvcompress("generate", output, "--prompt", PROMPT, "--max-new-tokens", n_tokens, *flags, "--json")
    assert outcome.code == 0 and outcome.stderr == ""
    return json.loads(outcome.stdout)


def n_cached(model, document):
    """The last new token is never fed back, so it is not in the cache."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return len(tokenizer(PROMPT)["input_ids"]) + document["new_tokens"] - 1


def test_json_states_the_text_and_the_measured_bytes(kvcompress, any_form, model):
    document = run(kvcompress, any_form)
    assert set(document) == {"prompt", "text", "new_tokens", "seconds", "cache_bytes"}
    assert document["prompt"] == PROMPT
    assert 1 <= document["new_tokens"] <= 60
    plan, n = Plan.load(any_form), n_cached(model, document)
    assert document["cache_bytes"] == {
        "measured": plan.cache_bytes(n, exact_number_bytes=4),
        "original": n * plan.original_bytes_per_token,
    }


def test_where_steps_can_be_recorded_they_are(kvcompress, compressed, monkeypatch):
    """On a GPU; the stand-in for one records nothing, and its cache is seen to be of the kind that could be."""
    growing, caches, new = run(kvcompress, compressed()), [], attach.recorded_cache
    monkeypatch.setattr(recording, "recordable", lambda device: True)
    monkeypatch.setattr(attach, "recorded_cache", lambda *args: caches.append(new(*args)) or caches[-1])
    fixed = run(kvcompress, compressed())
    assert fixed["text"] == growing["text"]
    (cache,) = caches
    assert isinstance(cache, recording.RecordedCache) and cache.get_seq_length() > 60
    assert fixed["cache_bytes"]["measured"] == cache.nbytes() >= growing["cache_bytes"]["measured"]


def test_in_its_own_dtype_the_cache_is_smaller(kvcompress, compressed):
    sizes = run(kvcompress, compressed(keep=0.25), "--dtype", "bfloat16", n_tokens=100)["cache_bytes"]
    assert sizes["measured"] < 0.6 * sizes["original"]


def test_with_everything_kept_it_says_what_the_model_says(kvcompress, compressed, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = original.generate(**inputs, max_new_tokens=60, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run(kvcompress, compressed(keep=1.0))["text"] == expected


def test_sampling_is_seeded(kvcompress, compressed):
    first, again, other = (
        run(kvcompress, compressed(), "--temperature", "1.5", "--seed", seed)["text"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_for_people_it_prints_the_text_and_the_cache(kvcompress, compressed):
    outcome = kvcompress("generate", compressed(), "--prompt", PROMPT, "--max-new-tokens", "5")
    assert outcome.code == 0 and outcome.stderr == ""
    assert outcome.stdout.startswith(PROMPT)
    text = " ".join(outcome.stdout.split())
    assert "tokens/s" in text and "measured (this run keeps exact tokens in float32)" in text


def test_the_chat_template_is_used_when_asked_for(kvcompress, fails, compressed, tmp_path):
    assert "no chat template" in fails("generate", compressed(), "--prompt", PROMPT, "--chat")
    output = shutil.copytree(compressed(), tmp_path / "copy")
    (output / "chat_template.jinja").write_text("{{ messages[0].content }} and {{ messages[0].content }}")
    plain, chat = (run(kvcompress, output, *flags, n_tokens=1)["cache_bytes"] for flags in ([], ["--chat"]))
    assert chat["original"] > 1.5 * plain["original"]


def test_failures_are_one_line(fails, compressed, tmp_path):
    assert "is not an output of kvcompress compress" in fails("generate", tmp_path, "--prompt", PROMPT)
    assert "the prompt has no tokens" in fails("generate", compressed(), "--prompt", "")
    assert "--max-new-tokens" in fails("generate", compressed(), "--prompt", PROMPT, "--max-new-tokens", "0")
    for seed in ("-1", str(10**20)):
        assert "--seed" in fails("generate", compressed(), "--prompt", PROMPT, "--seed", seed)


@pytest.mark.parametrize("missing", ["kv_maps.safetensors", "kv_plan.json"])
def test_a_missing_file_is_one_line(fails, compressed, tmp_path, missing):
    output = shutil.copytree(compressed(), tmp_path / "copy")
    (output / missing).unlink()
    assert missing in fails("generate", output, "--prompt", PROMPT)


def test_what_would_compress_nothing_is_one_line(fails, compressed, text, monkeypatch):
    """A release of transformers that calls the cache something else: no command runs on as if nothing were wrong."""
    monkeypatch.setattr(
        ForwardArguments,
        "with_cache",
        lambda self, args, kwargs, cache: (args, {k: v for k, v in kwargs.items() if k not in CACHE_NAMES}),
    )
    for command in (["generate", compressed(), "--prompt", PROMPT], ["eval", compressed(), "--text", text]):
        assert "nothing would be compressed" in fails(*command)
