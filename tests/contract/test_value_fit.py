"""Values' decoders fitted to what queries read of them, with the codec in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.calibration.at_hand import Elsewhere
from kvcompress.calibration.calibrate import obtain_moments
from kvcompress.calibration.memory import whole_bytes
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.layer import LayerCodecs
from kvcompress.errors import CalibrationError, Note, OptionError
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.planning import make_plan, refit_values
from kvcompress.runtime import value_fit
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from kvcompress.runtime.output import read_output
from tests.sharing import Backwards
from tests.tiny_models import random_ids
from tests.unit.test_refit import WIDTH, maps_of, tokens

OPTIONS = CompressOptions(keep=0.15, sinks=2, recent=4, policy="uniform")


@pytest.fixture(params=["llama-gqa", "qwen3"])
def planned(request: pytest.FixtureRequest, tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any) -> Any:
    """(model, plan, maps, moments with text)"""
    family = request.param
    moments = replace(tiny_moments(family), text=random_ids(24, 64, seed=3).int())
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        plan, maps, _ = make_plan(checkpoint, moments, OPTIONS)
    return tiny_model(family), plan, maps, moments


def drifting(n: int, seed: int) -> Tensor:
    """Tokens of which a part stays the same for 20 of them, in directions that are not those of single tokens."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9)) / 4
    return tokens(n, seed) + (torch.randn(n // 20, 2, generator=generator) @ ways).repeat_interleave(20, 0)


def read(maps: SiteMaps, seed: int) -> tuple[value_fit.ReadValues, Callable[[SiteMaps], float]]:
    """What queries read of runs of tokens, and the error of what maps give them instead."""
    x = drifting(4000, seed)
    value = x.unflatten(1, (2, -1)).transpose(0, 1)[None]
    weights = torch.rand(1, 2, 1200, 4000, generator=torch.Generator().manual_seed(seed))
    run = torch.arange(1200)[:, None] % 200 == torch.arange(4000) // 20
    weights = run * weights / 20  # near tokens have the rest
    own = LayerCodecs(None, SiteCodec(maps, torch.device("cpu")), None, 2, 8)
    found, latents = value_fit.ReadValues(own, maps), own.value_latents(value)
    assert latents is not None
    found.reader(latents, value)(weights)

    def error(other: SiteMaps) -> float:
        codecs = LayerCodecs(None, SiteCodec(other, torch.device("cpu")), None, 2, 8)
        latents = codecs.value_latents(value)
        assert latents is not None
        return float((weights @ (codecs.decode_values(latents) - value)).square().mean())

    return found, error


@pytest.mark.usefixtures("no_batches")
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_unseen_averages_are_rebuilt_better(n_blocks: int) -> None:
    maps = maps_of(drifting(6000, 1), n_blocks)
    seen, _ = read(maps, 2)
    _, error = read(maps, 3)
    assert error(seen.fitted(maps)) < 0.9 * error(maps)


def test_values_alone_are_fitted(planned: Any) -> None:
    model, plan, maps, moments = planned
    fitted = dict(maps)
    refit_values(lambda: model, plan, fitted, moments)
    for site, own in maps.items():
        for name in ("blocks", "encoder", "block", "bits", "step"):
            assert torch.equal(getattr(fitted[site], name), getattr(own, name))
        assert torch.equal(fitted[site].decoder, own.decoder) == (site.part == "key")


def test_each_head_has_the_decoder_of_least_squares(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numbers put together query by query, of one layer that is told weights."""
    monkeypatch.setattr(value_fit, "_PRIOR_TOKENS", 0)
    model, plan, maps, _ = planned
    attach_plan(model, plan, maps)
    codecs = attachment_of(model).codecs[0]
    detach(model)
    own, generator = maps[Site(0, "value")], torch.Generator().manual_seed(0)
    n_heads, width = codecs.value_shape
    value = torch.randn(1, n_heads, 200, width, generator=generator)
    weights = torch.rand(1, n_heads, 320, 200, generator=generator).square()
    read, latents = value_fit.ReadValues(codecs, own), codecs.value_latents(value)
    assert latents is not None
    read.reader(latents, value)(weights)
    fitted = read.fitted(own)
    codec = SiteCodec(own, torch.device("cpu"))
    flat = value.transpose(1, 2).flatten(2)[0]
    assert codec.mean is not None and own.mean is not None and fitted.mean is not None
    codes = codec.latents(codec.encode(flat - codec.mean)).double()
    for head in range(n_heads):
        block, inside = divmod(head * width, own.blocks.shape[1])
        mine = own.block == block
        a = weights[0, head, :: value_fit._EVERY].double()
        seen = torch.cat([a @ codes[:, mine], a.sum(1, keepdim=True)], 1)
        best = torch.linalg.lstsq(seen, a @ value[0, head].double()).solution
        decoder = fitted.decoder[mine, inside : inside + width].double() * own.step[mine, None].double()
        torch.testing.assert_close(decoder, best[:-1], atol=2e-3, rtol=2e-2)
        numbers = slice(head * width, (head + 1) * width)
        torch.testing.assert_close(fitted.mean[numbers].double(), best[-1], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(
    "changes", [{"ranks_only": True}, {"metric": "activation"}, {"key_basis": "frequency", "folded": True}]
)
def test_what_has_no_codes_to_fit_to_is_left_alone(
    changes: dict[str, Any], tiny_checkpoint: Any, tiny_moments: Any
) -> None:
    moments = replace(tiny_moments("llama-gqa"), text=random_ids(2, 64, seed=3).int())
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        plan, maps, _ = make_plan(checkpoint, moments, replace(OPTIONS, keep=0.5, **changes))
    before = dict(maps)
    refit_values(pytest.fail, plan, maps, moments)  # type: ignore[arg-type]
    assert maps == before


def test_compress_fits_again_from_saved_moments(tiny_checkpoint: Any, tmp_path: Path, text_file: Path) -> None:
    options = replace(OPTIONS, tokens=512, seq_len=64, calibration=(str(text_file),))
    source = tiny_checkpoint("llama-gqa")
    for name in ("first", "again"):
        compress(source, tmp_path / name, options, device="cpu")
    with open_checkpoint(source) as checkpoint:
        moments = obtain_moments(checkpoint, tmp_path / "x", options, device="cpu")
        _, alone, _ = make_plan(checkpoint, moments, options)
    first, again = (read_output(tmp_path / name)[1] for name in ("first", "again"))
    site = Site(0, "value")
    assert torch.equal(first[site].decoder, again[site].decoder)
    assert not torch.equal(first[site].decoder, alone[site].decoder)


@pytest.mark.parametrize("how", ["streamed, from saved moments", "streamed", "by a worker"])
def test_where_the_model_does_not_fit(how: str, tiny_checkpoint: Any, tmp_path: Path, text_file: Path) -> None:
    """To the same numbers: by layers that come from disk, by a worker, or both."""
    pytest.importorskip("accelerate")
    options, source = (
        replace(OPTIONS, tokens=512, seq_len=64, calibration=(str(text_file),)),
        tiny_checkpoint("llama-gqa"),
    )
    with open_checkpoint(source) as checkpoint:
        memory = whole_bytes(checkpoint, "float32", options.seq_len) - 1
    (tmp_path / "other").mkdir()
    other = tmp_path / ("again" if "saved" in how else "other/out")
    compress(source, tmp_path / "first", options, device="cpu")
    workers = Backwards() if "worker" in how else None
    compress(source, other, options, device="cpu", memory=memory if "streamed" in how else None, workers=workers)
    first, again = (read_output(directory)[1] for directory in (tmp_path / "first", other))
    assert workers is None or workers.called.count("_fitted") == 1
    for site, own in first.items():
        for name in ("encoder", "decoder", "mean"):
            torch.testing.assert_close(getattr(own, name), getattr(again[site], name), rtol=1e-3, atol=1e-4)


def test_maps_that_lie_on_disk(tiny_checkpoint: Any, tiny_moments: Any, tmp_path: Path) -> None:
    """A worker of this host reads them there; to others they are not sent, which is said."""
    moments = replace(tiny_moments("llama-gqa"), text=random_ids(4, 64, seed=3).int())
    source, found = tiny_checkpoint("llama-gqa"), []
    for name in ("held", "disk", "far"):
        (tmp_path / name).mkdir()
        with open_checkpoint(source) as checkpoint:
            scratch = None if name == "held" else tmp_path / name
            plan, maps, _ = make_plan(checkpoint, moments, OPTIONS, scratch=scratch)
        workers = Backwards()
        workers.is_remote = name == "far"
        place = Elsewhere(str(source), "float32", "cpu", None, workers)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            refit_values(lambda place=place: place, plan, maps, moments)
        assert any("too large to be sent" in str(note.message) for note in notes) is (name == "far")
        found.append(dict(maps))
    site = Site(0, "value")
    assert torch.equal(found[0][site].decoder, found[1][site].decoder)
    assert not torch.equal(found[0][site].decoder, found[2][site].decoder)


def test_layers_that_cannot_be_streamed_are_said(
    tiny_checkpoint: Any, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, tokens=512, seq_len=64, calibration=(str(text_file),))
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "first", options, device="cpu")
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        memory = whole_bytes(checkpoint, "float32", options.seq_len) - 1

    def refuse(*_: Any) -> None:
        raise OptionError("it cannot be streamed.")

    monkeypatch.setattr("kvcompress.runtime.value_fit_elsewhere.streamed_model", refuse)
    with pytest.warns(Note, match="are not fitted to what queries read of them: it cannot be streamed"):
        compress(tiny_checkpoint("llama-gqa"), tmp_path / "again", options, device="cpu", memory=memory)


def test_text_of_another_vocabulary_is_refused(tiny_checkpoint: Any, tmp_path: Path, text_file: Path) -> None:
    options = replace(OPTIONS, tokens=256, seq_len=64, calibration=(str(text_file),))
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        moments = obtain_moments(checkpoint, tmp_path / "x", options, device="cpu")
        assert moments.text is not None
        moments.text[0, 0] = checkpoint.spec.vocab_size
        moments.save(next(tmp_path.glob("kvcompress-moments-*.safetensors")))
        with pytest.raises(CalibrationError, match="text of another model"):
            obtain_moments(checkpoint, tmp_path / "x", options, device="cpu")


def test_few_tokens_leave_decoders_nearly_as_they_were(planned: Any) -> None:
    model, plan, maps, moments = planned
    assert moments.text is not None
    changes = []
    for n_tokens in (16, 64):
        fitted = dict(maps)
        refit_values(lambda: model, plan, fitted, replace(moments, text=moments.text[:, :n_tokens]))
        site = Site(0, "value")
        changes.append(float((fitted[site].decoder - maps[site].decoder).float().norm()))
    assert 0 < 1.5 * changes[0] < changes[1]


def test_windows_read_together_are_the_same(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU reads several windows at once; what is summed up is theirs, one by one."""
    model, plan, maps, moments = planned
    found = []
    for at_once in (1, 5):
        monkeypatch.setattr(value_fit, "_windows_at_once", lambda *_, n=at_once: n)
        own, done = dict(maps), []
        value_fit.fit_values(model, plan, own, moments.text.long(), lambda *x, done=done: done.append(x))
        assert done[-1] == (24 * 64, 24 * 64) and len(done) == -(-24 // at_once)
        found.append(own)
    fitted = [site for site in maps if not torch.equal(found[0][site].decoder, maps[site].decoder)]
    assert fitted
    for site in fitted:
        one, five = (f[site].decoder.float() for f in found)
        assert float((one - five).norm()) < 0.02 * float((one - maps[site].decoder.float()).norm())
