"""At full rank the compressed cache is DynamicCache: the same tokens, the same logits to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from kvcompress.runtime.cache import CompressedCache
from tests.coding import coded_plan
from tests.tiny_models import FAMILIES, PAD, random_ids

N_NEW = 24
#: float32 rounding through an encoder and a decoder; the logits have a standard deviation of about 2.
TOLERANCE = 5e-4
KEY_BASES = ("head", "share", "frequency", "band", "per_head", "latent")
pytestmark = pytest.mark.usefixtures("never_exact")


@pytest.fixture
def attached(tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any) -> Any:
    """attached(family, **coded_plan arguments): a model whose cache codes every site at full rank."""

    def make(family: str, **arguments: Any) -> Any:
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            plan, maps = coded_plan(checkpoint, tiny_moments(family), **arguments)
        return attach_plan(tiny_model(family), plan, maps)

    return make


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False, "pad_token_id": PAD} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def assert_same(coded: Any, original: Any) -> None:
    assert torch.equal(coded.sequences, original.sequences)
    for ours, theirs in zip(coded.logits, original.logits, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE


def both(model: Any, ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Return what the attached model generates, and what the same model generates with a DynamicCache."""
    coded = generate(model, ids, **options)
    assert isinstance(coded.past_key_values, CompressedCache)
    assert coded.past_key_values.layers[0].n_encoded > 0
    detach(model)
    original = generate(model, ids, **options)
    assert isinstance(original.past_key_values, DynamicCache)
    return coded, original


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-bf16"])
def test_greedy(attached: Any, family: str) -> None:
    assert_same(*both(attached(family), random_ids(2, 21)))


@pytest.mark.parametrize("family", ["phi3-partial", "smollm3"])  # heads turned in part, layers that do not turn
@pytest.mark.parametrize("key_basis", KEY_BASES[:-1])
def test_greedy_with_every_key_basis(attached: Any, family: str, key_basis: str) -> None:
    value_basis = key_basis if key_basis in ("head", "per_head") else "latent"
    assert_same(*both(attached(family, key_basis=key_basis, value_basis=value_basis), random_ids(1, 21)))


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (0, 3), (4, 0), (4, 1), (3, 64), (40, 2)])
def test_greedy_with_any_window(attached: Any, sinks: int, recent: int) -> None:
    model = attached("llama-gqa", sinks=sinks, recent=recent)
    coded = generate(model, random_ids(2, 21), max_new_tokens=50, min_new_tokens=50)
    detach(model)
    assert_same(coded, generate(model, random_ids(2, 21), max_new_tokens=50, min_new_tokens=50))


def test_bfloat16_checkpoint_run_in_float32(attached: Any) -> None:
    """Maps and latents are float16 there, three decimal digits: logits agree to those, not to float32's."""
    model = attached("llama-bf16")
    ids = random_ids(1, 30)
    coded = model(ids[:, :-1]).past_key_values
    ours = model(ids[:, -1:], past_key_values=coded).logits
    detach(model)
    theirs = model(ids).logits[:, -1:]
    assert 0 < (ours - theirs).abs().max() < 0.1


def test_seeded_sampling(attached: Any) -> None:
    model = attached("llama-gqa")
    torch.manual_seed(3)
    coded = generate(model, random_ids(3, 21), do_sample=True, temperature=0.7)
    detach(model)
    torch.manual_seed(3)
    assert torch.equal(coded.sequences, generate(model, random_ids(3, 21), do_sample=True, temperature=0.7).sequences)


@pytest.mark.parametrize("family", ["llama-gqa", "smollm3"])
def test_beam_search(attached: Any, family: str) -> None:
    coded, original = both(attached(family), random_ids(2, 21), num_beams=3)
    assert torch.equal(coded.sequences, original.sequences)


def test_several_returned_sequences(attached: Any) -> None:
    model = attached("llama-gqa")
    torch.manual_seed(5)
    coded = generate(model, random_ids(2, 21), do_sample=True, num_return_sequences=2)
    detach(model)
    torch.manual_seed(5)
    original = generate(model, random_ids(2, 21), do_sample=True, num_return_sequences=2)
    assert torch.equal(coded.sequences, original.sequences)


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask) of rows padded on the left to the longest."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), PAD)
    for row, target in zip(rows, ids, strict=True):
        target[longest - len(row) :] = row
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-sliding", "qwen3", "phi3-partial", "smollm3"])
def test_left_padded_batch(attached: Any, family: str) -> None:
    rows = [random_ids(1, n, seed=n)[0] for n in (9, 25, 17)]
    model = attached(family)
    ids, mask = padded(rows)
    coded = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = generate(model, row[None])
        assert torch.equal(coded.sequences[i, -N_NEW:], alone.sequences[0, -N_NEW:])
    detach(model)
    assert_same(coded, generate(model, ids, attention_mask=mask))


@pytest.mark.parametrize("assistant", ["model", "prompt lookup"])
@pytest.mark.parametrize("recent", [0, 4])
def test_assisted_decoding(attached: Any, tiny_model: Any, assistant: str, recent: int) -> None:
    if assistant == "model":  # a near copy, so that some drafts are accepted and some are not
        draft = tiny_model("llama-gqa")
        with torch.no_grad():
            torch.manual_seed(0)
            draft.lm_head.weight.add_(0.05 * torch.randn_like(draft.lm_head.weight))
        options: dict[str, Any] = {"assistant_model": draft}
    else:
        options = {"prompt_lookup_num_tokens": 3}
    shorter = {"min_new_tokens": None}  # transformers 5.0 takes no least length together with a draft
    ids = random_ids(1, 12).repeat(1, 2)
    model = attached("llama-gqa", recent=recent)
    crops: list[Any] = []
    crop = CompressedCache.crop

    def counted(self: CompressedCache, *args: int, **kwargs: int) -> None:
        crops.append(args)
        crop(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressedCache, "crop", counted)
        coded = generate(model, ids, **shorter, **options)
    assert crops
    detach(model)
    assert torch.equal(coded.sequences, generate(model, ids, **shorter).sequences)


def test_turns_with_one_cache_equal_one_long_prompt(attached: Any) -> None:
    model = attached("llama-gqa")
    first = generate(model, random_ids(1, 15))
    prompt = torch.cat([first.sequences, random_ids(1, 9, seed=1)], 1)
    second = generate(model, prompt, past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    assert second.past_key_values.get_seq_length() == second.sequences.shape[1] - 1
    detach(model)
    assert_same(second, generate(model, prompt))


def test_chunked_prefill_equals_one_pass(attached: Any) -> None:
    model = attached("qwen2", recent=3)
    ids = random_ids(2, 30)
    cache = attachment_of(model).new_cache()
    chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split([11, 1, 7, 11], 1)]
    detach(model)
    assert (torch.cat(chunks, 1) - model(ids).logits).abs().max() < TOLERANCE
