"""The figures of `evaluate`: against plain cross-entropy, and decode-faithful at every window."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import kvcompress
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError, OptionError
from kvcompress.evaluate import perplexity
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.planning import make_plan
from kvcompress.runtime.attach import attach_plan, attachment_of

SEQ_LEN, N_WINDOWS = 32, 3


@pytest.fixture
def model_and_tokenizer(tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any) -> tuple[Any, Any]:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        options = CompressOptions(keep=0.125, sinks=2, recent=0, policy="uniform")
        plan, maps, _ = make_plan(checkpoint, tiny_moments("llama-gqa"), options)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    return attach_plan(tiny_model("llama-gqa"), plan, maps), tokenizer


def windows(tokenizer: Any, file: Path) -> torch.Tensor:
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: N_WINDOWS * SEQ_LEN]).reshape(N_WINDOWS, SEQ_LEN)


def test_figures_are_those_of_the_logits(model_and_tokenizer: tuple[Any, Any], text_file: Path) -> None:
    model, tokenizer = model_and_tokenizer
    ids = windows(tokenizer, text_file)
    result = evaluate(model, tokenizer, str(text_file), seq_len=SEQ_LEN, max_windows=N_WINDOWS)
    with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=0):
        coded = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    attachment_plan = attachment_of(model).plan
    kvcompress.detach(model)
    exact = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = [-p.gather(-1, ids[:, 1:, None]).mean().item() for p in (exact, coded)]
    assert result.perplexity["original"] == pytest.approx(math.exp(nll[0]), rel=1e-4)
    assert result.perplexity["compressed"] == pytest.approx(math.exp(nll[1]), rel=1e-4)
    assert result.perplexity["ratio"] == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-4)
    assert result.kl_nats == pytest.approx((exact.exp() * (exact - coded)).sum(-1).mean().item(), rel=1e-3)
    assert result.top1_agreement == (exact.argmax(-1) == coded.argmax(-1)).double().mean().item()
    assert result.keep == attachment_plan.keep <= 0.125
    assert result.kl_nats > 0.01


def test_the_distance_is_that_of_what_was_encoded(model_and_tokenizer: tuple[Any, Any], text_file: Path) -> None:
    """Against the components of every site, computed from the tokens that arrive there."""
    model, tokenizer = model_and_tokenizer
    result = evaluate(model, tokenizer, str(text_file), seq_len=SEQ_LEN, max_windows=1)
    codecs = [codec for layer in attachment_of(model).codecs for codec in (layer.key, layer.value) if codec]
    energies = []
    for codec in codecs:
        encode = codec.encode

        def spy(x: torch.Tensor, encode: Any = encode, codec: Any = codec) -> Any:
            z = codec.project(x)[:, 2:] * codec.step
            energies.append(z.square().mean().item())
            return encode(x)

        codec.encode = spy
    with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=0):
        model(windows(tokenizer, text_file)[:1], use_cache=False)
    mean = math.exp(sum(map(math.log, energies)) / len(energies))
    assert len(energies) == len(codecs) > 0
    assert result.distance is not None and result.distance.component_energy == pytest.approx(mean, rel=1e-3)
    assert result.to_json()["distance"]["is_far"] is result.distance.is_far


def test_windows_that_are_read_together_have_the_figures_of_each_alone(
    model_and_tokenizer: tuple[Any, Any], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU reads them; the last ones are fewer."""
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "max_windows": N_WINDOWS}
    alone = evaluate(*model_and_tokenizer, str(text_file), **options)
    monkeypatch.setattr(perplexity, "_at_once", lambda *_: N_WINDOWS - 1)
    done: list[int] = []
    together = evaluate(*model_and_tokenizer, str(text_file), **options, progress=lambda n, _: done.append(n))
    assert done == [N_WINDOWS - 1, N_WINDOWS]
    assert together.log_ratios == pytest.approx(alone.log_ratios, abs=1e-5)
    assert together.kl_nats == pytest.approx(alone.kl_nats, rel=1e-3)
    assert alone.distance is not None and together.distance is not None
    assert together.distance.component_energy == pytest.approx(alone.distance.component_energy, rel=1e-4)


def test_a_window_as_long_as_the_text_changes_nothing(model_and_tokenizer: tuple[Any, Any], text_file: Path) -> None:
    options = {"seq_len": SEQ_LEN, "max_windows": N_WINDOWS, "recent": SEQ_LEN}
    result = evaluate(*model_and_tokenizer, str(text_file), **options)
    assert result.perplexity["ratio"] == pytest.approx(1, abs=1e-4)
    assert result.kl_nats == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement > 0.98


def test_a_wider_window_never_hurts_here(model_and_tokenizer: tuple[Any, Any], text_file: Path) -> None:
    options = {"seq_len": SEQ_LEN, "max_windows": N_WINDOWS}
    kl = [evaluate(*model_and_tokenizer, str(text_file), recent=r, **options).kl_nats for r in (0, 8, 24)]
    assert kl == sorted(kl, reverse=True)


def test_protocol(model_and_tokenizer: tuple[Any, Any], text_file: Path) -> None:
    result = evaluate(*model_and_tokenizer, str(text_file), seq_len=SEQ_LEN, max_windows=N_WINDOWS, sinks=1)
    assert result.to_json()["protocol"] == {
        "text": "prose.txt",
        "text_sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(),
        "seq_len": SEQ_LEN,
        "windows": N_WINDOWS,
        "sinks": 1,
        "recent": 0,
        "dtype": "float32",
    }


def test_progress_is_reported(model_and_tokenizer: tuple[Any, Any], text_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        *model_and_tokenizer,
        str(text_file),
        seq_len=SEQ_LEN,
        max_windows=N_WINDOWS,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_little_text(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The river.")
    with pytest.raises(CalibrationError, match="too little text"):
        evaluate(*model_and_tokenizer, str(tmp_path / "short.txt"), seq_len=SEQ_LEN)


def test_a_plain_model_is_refused(tiny_model: Any, text_file: Path) -> None:
    with pytest.raises(OptionError, match="no compressed cache"):
        evaluate(tiny_model("llama-gqa"), None, str(text_file))


def test_a_folded_model_is_measured_against_its_original(
    tiny_checkpoint: Any, tiny_model: Any, text_file: Path, tmp_path: Path
) -> None:
    options = CompressOptions(metric="weights", key_basis="frequency", policy="uniform", keep=0.5, folded=True)
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", options)
    model, tokenizer = kvcompress.load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(OptionError, match="original"):
        evaluate(model, tokenizer, str(text_file), seq_len=SEQ_LEN)
    original = tiny_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # a healed fold may have a head of its own
    result = evaluate(model, tokenizer, str(text_file), original=original, seq_len=SEQ_LEN, max_windows=N_WINDOWS)
    ids = windows(tokenizer, text_file)
    nll = original(ids, labels=ids).loss.item(), model(ids, labels=ids).loss.item()
    assert result.perplexity["original"] == pytest.approx(math.exp(nll[0]), rel=1e-3)
    assert result.perplexity["compressed"] == pytest.approx(math.exp(nll[1]), rel=1e-3)
    assert result.kl_nats > 0.01
