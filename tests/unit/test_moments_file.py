"""Saved moments: exact round trips, resumed passes, and what the pipeline reuses."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from kvcompress.calibration import fisher, measured
from kvcompress.calibration.calibrate import obtain_moments
from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.calibration.weights_only import weight_moments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError, Note, UnsupportedModelError
from kvcompress.model.probe import probe
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from tests.tiny_models import random_ids


def assert_equal(ours: Moments, expected: Moments) -> None:
    """Bit for bit."""
    assert list(ours.sites) == list(expected.sites)
    assert (ours.protocol, ours.order) == (expected.protocol, expected.order)
    for site, sums in ours.sites.items():
        other = expected.sites[site]
        assert sums.n_tokens == other.n_tokens
        mine, theirs = tensors_of(sums), tensors_of(other)
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def tensors_of(sums: SiteMoments) -> list[torch.Tensor]:
    blocks = [*sums.partitions, *sums.outer, *sums.fisher, *sums.weighed_outer]
    coherence = [] if sums.coherence is None else [sums.coherence]
    return [*blocks, sums.total, sums.samples, sums.weighed_total, sums.weighed_samples, *coherence]


def test_round_trip(tiny_moments: Any, tmp_path: Path) -> None:
    moments = dataclasses.replace(tiny_moments("qwen3"), protocol={"mode": "fisher", "sources": ["a", "b"], "seed": 3})
    moments.save(tmp_path / "m.safetensors")
    assert_equal(Moments.load(tmp_path / "m.safetensors"), moments)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_round_trip_of_several_partitions(tiny_checkpoint: Any, tiny_model: Any, tmp_path: Path) -> None:
    with open_checkpoint(tiny_checkpoint("llama-mha")) as checkpoint:
        moments = empty_moments(checkpoint.spec, {"mode": "fisher"}, group=2, band=4)
        assert [p.shape for p in next(iter(moments.sites.values())).partitions] == [(2, 16), (2, 16)]
        collect_moments(tiny_model("llama-mha"), checkpoint.spec, random_ids(2, 20), moments, sinks=1, recent=0, seed=0)
    moments.save(tmp_path / "m.safetensors")
    assert_equal(Moments.load(tmp_path / "m.safetensors"), moments)


@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_pass_gives_the_sums_of_an_unbroken_one(
    tiny_checkpoint: Any, tiny_model: Any, tmp_path: Path, cut: int
) -> None:
    windows = random_ids(5, 24)

    def run(moments: Moments, n: int) -> Moments:
        with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
            return collect_moments(
                tiny_model("llama-gqa"), checkpoint.spec, windows[:n], moments, sinks=2, recent=3, seed=9
            )

    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        unbroken, broken = (
            empty_moments(checkpoint.spec, {"seed": 9}, group=checkpoint.spec.layers[0].n_kv_heads) for _ in range(2)
        )
    run(unbroken, 5)
    run(broken, cut).save(tmp_path / "m.safetensors")
    resumed = Moments.load(tmp_path / "m.safetensors")
    assert resumed.n_windows == cut
    assert_equal(run(resumed, 5), unbroken)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CalibrationError, match="no usable moments") as error:
        Moments.load(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value)


def test_data_free_moments_need_linear_keys(tiny_checkpoint: Any) -> None:
    key_norm = pytest.raises(UnsupportedModelError, match="normalises its keys")
    with open_checkpoint(tiny_checkpoint("qwen3")) as checkpoint, key_norm:
        weight_moments(checkpoint, group=checkpoint.spec.layers[0].n_kv_heads)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "phi3"])
def test_data_free_moments_are_those_of_the_weights(tiny_checkpoint: Any, family: str) -> None:
    """C = W W^T about the bias, which is the mean, and F = I."""
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        moments = weight_moments(checkpoint, group=checkpoint.spec.layers[0].n_kv_heads)
        assert not moments.has_fisher
        for site, sums in moments.sites.items():
            weight, bias = checkpoint.site_weight(site)
            whole = torch.arange(len(weight))[None]
            torch.testing.assert_close(sums.covariance(whole, centred=True)[0], weight @ weight.T)
            torch.testing.assert_close(sums.mean, torch.zeros(len(weight)).double() if bias is None else bias)
            assert torch.equal(sums.fisher_information(whole)[0], torch.eye(len(weight), dtype=torch.float64))


class TestReuse:
    """A changed policy or budget never calibrates again; a changed text or model does."""

    @pytest.fixture
    def calibrations(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry for every pass over text."""
        passes: list[int] = []

        def counted(*args: Any, **kwargs: Any) -> Moments:
            if "which" in kwargs:  # not the short one that measures coherence
                passes.append(len(args[2]))
            return collect_moments(*args, **kwargs)

        monkeypatch.setattr(measured, "collect_moments", counted)
        return passes

    @pytest.fixture
    def options(self, text_file: Path) -> CompressOptions:
        return CompressOptions(calibration=(str(text_file),), tokens=128, seq_len=32, sinks=2, recent=4)

    def test_a_model_is_proven_once(
        self, tiny_checkpoint: Any, tmp_path: Path, options: CompressOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proven: list[Any] = []
        monkeypatch.setattr(fisher, "probe", lambda model: (proven.append(model), probe(model))[1])
        compress(tiny_checkpoint("llama-gqa"), tmp_path / "a", options, device="cpu")
        assert len(proven) == 1

    def test_other_budgets_bases_and_policies(
        self, tiny_checkpoint: Any, tmp_path: Path, options: CompressOptions, calibrations: list[int]
    ) -> None:
        source = tiny_checkpoint("llama-gqa")
        compress(source, tmp_path / "a", options, device="cpu")
        changes = [
            {"keep": 0.25},
            {"policy": "energy"},
            {"key_basis": "band", "band": 4},
            {"group": 1},
            {"key_basis": "head", "value_basis": "head", "ranks_only": True},
            {"metric": "activation"},
            {"key_basis": "frequency", "policy": "uniform", "folded": True, "keep": 0.5},
            {"maps_only": True},
        ]
        for i, change in enumerate(changes):
            compress(source, tmp_path / f"b{i}", dataclasses.replace(options, **change), device="cpu")
        assert calibrations == [4]

    @pytest.mark.parametrize(
        "change",
        [
            {"tokens": 160},
            {"seq_len": 16},
            {"sinks": 3},
            {"recent": 5},
            {"seed": 1},
            {"calibration": ("builtin:code",)},
        ],
        ids=str,
    )
    def test_another_protocol(
        self, tiny_checkpoint: Any, tmp_path: Path, options: CompressOptions, calibrations: list[int], change: Any
    ) -> None:
        source = tiny_checkpoint("llama-gqa")
        compress(source, tmp_path / "a", options, device="cpu")
        compress(source, tmp_path / "b", dataclasses.replace(options, **change), device="cpu")
        assert len(calibrations) == 2

    @pytest.mark.parametrize("as_directory", [False, True])
    def test_changed_text(
        self,
        tiny_checkpoint: Any,
        tmp_path: Path,
        options: CompressOptions,
        calibrations: list[int],
        text_file: Path,
        as_directory: bool,
    ) -> None:
        text = tmp_path / "texts" / "t.txt"
        text.parent.mkdir()
        text.write_text(text_file.read_text())
        options = dataclasses.replace(options, calibration=(str(text.parent if as_directory else text),))
        for name, content in (("a", text.read_text()), ("b", text.read_text()[::-1])):
            text.write_text(content)
            compress(tiny_checkpoint("llama-gqa"), tmp_path / name, options, device="cpu")
        assert len(calibrations) == 2

    def test_another_model(
        self, tiny_checkpoint: Any, tmp_path: Path, options: CompressOptions, calibrations: list[int]
    ) -> None:
        for seed in (0, 1):
            compress(tiny_checkpoint("llama-gqa", seed=seed), tmp_path / f"out{seed}", options, device="cpu")
        assert len(calibrations) == 2

    def test_two_at_once(self, tiny_checkpoint: Any, tmp_path: Path, options: CompressOptions) -> None:
        """The second waits, says so, and takes the moments of the first; what a killed one left is in nobody's way."""
        compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", options, device="cpu")
        saved = next(tmp_path.glob("kvcompress-moments-*.safetensors"))
        lock, aside = saved.with_suffix(".lock"), tmp_path / "aside"
        assert not lock.exists()
        lock.touch()
        compress(tiny_checkpoint("llama-gqa"), tmp_path / "again", options, device="cpu")
        assert saved.exists() and not lock.exists()
        saved.rename(aside)
        first = FileLock(lock, thread_local=False)
        first.acquire()
        told: list[str] = []

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            told.append(str(message))
            aside.rename(saved)
            first.release()

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("always", Note)
            patch.setattr(warnings, "showwarning", show)
            patch.setattr(measured, "measured_moments", None)  # nothing is calibrated
            compress(tiny_checkpoint("llama-gqa"), tmp_path / "second", options, device="cpu")
        assert told == [f"another process calibrates to {saved}: waiting for its moments."]
        assert {p.name for p in tmp_path.iterdir()} == {"again", "out", "second", saved.name}

    def test_text_that_the_model_samples_itself(
        self, tiny_checkpoint: Any, tmp_path: Path, options: CompressOptions
    ) -> None:
        """Seeded: the same windows, so the same moments; half of them from the given text."""
        options = dataclasses.replace(options, calibration=("self", *options.calibration))
        found = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
                found.append(obtain_moments(checkpoint, tmp_path / name / "out", options, device="cpu"))
        assert_equal(*found)
        assert next(iter(found[0].sites.values())).n_tokens == 4 * 30


def test_progress_names_every_stage(tiny_checkpoint: Any, tmp_path: Path, text_file: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    options = CompressOptions(calibration=("self", str(text_file)), tokens=128, seq_len=32)
    compress(
        tiny_checkpoint("llama-gqa"), tmp_path / "out", options, device="cpu", progress=lambda *step: seen.append(step)
    )
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        "sample",
        "calibrate",
        "coherence",
        "fit",
        "values",
        "write",
    ]
    for stage in ("sample", "calibrate", "fit", "write"):
        steps = [(done, total) for s, done, total in seen if s == stage]
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
