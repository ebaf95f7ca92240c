"""A model whose layers come from disk: two of them in memory at most, the moments of the pass that holds it whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.memory import least_bytes, parse_bytes, whole_bytes
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.streamed import begun_windows, collect_streamed
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.errors import Note, OptionError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from tests.models.small import small_model
from tests.tiny_models import random_ids

pytest.importorskip("accelerate")
SEEN = {"sinks": 2, "recent": 4, "seed": 3}
CPU = torch.device("cpu")


def streamed_moments(directory: Path, windows: torch.Tensor, told: list[int] | None = None) -> Moments:
    with open_checkpoint(directory) as checkpoint:
        model = StreamedModel(checkpoint, dtype=torch.float32, device=CPU)
        moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
        report = (lambda done, _: told.append(done)) if told is not None else None
        return collect_streamed(model, checkpoint.spec, windows, moments, **SEEN, progress=report)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "llama-sharded", "qwen2", "qwen3", "phi3", "smollm3"])
def test_the_moments_are_those_of_the_whole_model(tiny_checkpoint: Any, family: str) -> None:
    windows = random_ids(5, 40, seed=7)
    told: list[int] = []
    ours = streamed_moments(tiny_checkpoint(family), windows, told)
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
        model = load_weights(checkpoint.path, dtype="float32")
        whole = collect_moments(model, checkpoint.spec, windows, moments, **SEEN)
    assert ours.rotations == whole.rotations and ours.signature == whole.signature
    assert ours.n_windows == whole.n_windows == 5
    for site, sums in whole.sites.items():
        mine = ours.sites[site]
        assert mine.n_tokens == sums.n_tokens and torch.equal(mine.samples, sums.samples)
        for a, b in zip((mine.total, *mine.outer, *mine.fisher), (sums.total, *sums.outer, *sums.fisher), strict=True):
            assert torch.equal(a, b)  # the same numbers added in the same order
    assert told == sorted(told) and told[-1] == windows.numel()


def test_two_layers_are_in_memory_at_most(tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs, whose weights are in its module, and one that is being read; in memory that is used again."""
    held: list[int] = []
    placed: list[int] = []
    with open_checkpoint(tiny_checkpoint("llama-gqa", num_hidden_layers=6)) as checkpoint:
        model = StreamedModel(checkpoint, dtype=torch.float32, device=CPU)
        come = model._come

        def counted(index: int, following: int | None) -> None:
            come(index, following)
            held.append(sum(not next(layer.parameters()).is_meta for layer in model.layers))
            placed.append(next(model.layers[index].parameters()).untyped_storage().data_ptr())

        monkeypatch.setattr(model, "_come", counted)
        moments = empty_moments(checkpoint.spec, {}, group=2)
        collect_streamed(model, checkpoint.spec, random_ids(2, 40), moments, **SEEN)
    assert max(held) == 1 and len(held) > 12
    assert len(set(placed)) == 2
    assert all(p.is_meta for p in model.layers.parameters())


class TestMemory:
    """compress(memory=...): streamed where the whole model does not fit, and then the same plan."""

    def run(self, source: Path, text: Path, out: Path, **how: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        chosen = CompressOptions(calibration=(str(text),), tokens=256, seq_len=32, recent=4, keep=0.25)
        options = replace(chosen, calibration=how.pop("calibration", chosen.calibration))
        compress(source, out, options, device="cpu", **how)
        plan = json.loads((out / "kv_plan.json").read_text())
        return plan, load_file(out / "kv_maps.safetensors")

    def test_the_plan_is_that_of_the_whole_model(
        self, tiny_checkpoint: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tiny_checkpoint("llama-gqa", num_hidden_layers=12)
        with open_checkpoint(source) as checkpoint:
            least, whole = least_bytes(checkpoint, "float32", 32), whole_bytes(checkpoint, "float32", 32)
        assert least < whole
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        plan, maps = self.run(source, text_file, tmp_path / "a" / "out")
        monkeypatch.setattr("kvcompress.checkpoint.loading.load_weights", None)  # the whole model is never loaded
        streamed, theirs = self.run(source, text_file, tmp_path / "b" / "out", memory=least)
        assert streamed["sites"] == plan["sites"] and streamed["keep"] == plan["keep"]
        assert maps.keys() == theirs.keys() and all(torch.equal(maps[n], theirs[n]) for n in maps)

    def test_sampled_text_is_left_out_and_said(self, tiny_checkpoint: Any, text_file: Path, tmp_path: Path) -> None:
        source = tiny_checkpoint("llama-gqa", num_hidden_layers=12)
        with open_checkpoint(source) as checkpoint:
            least = least_bytes(checkpoint, "float32", 32)
        with pytest.warns(Note, match=r"samples from itself \(self\) is left out"):
            plan, _ = self.run(source, text_file, tmp_path / "out", memory=least, calibration=("self", str(text_file)))
        assert plan["calibration"]["sources"] == [str(text_file)]

    def test_too_little(self, tiny_checkpoint: Any, text_file: Path, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"is too little for .* take about 0.00 GB"):
            self.run(tiny_checkpoint("llama-gqa"), text_file, tmp_path / "out", memory=1000)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("20GB", 20 * 10**9),
        ("6.5 GiB", 13 << 29),
        ("800M", 8 * 10**8),
        ("1024", 1024),
        ("1kb", 1000),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text: str, n: int) -> None:
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "many", "1e9", "5 i B", "1" * 30 + "GB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="is no size"):
        parse_bytes(text)


class TestResume:
    """A streamed pass that is killed goes on with the layer that it had begun."""

    @pytest.mark.parametrize("windows", [3, 11, 12, 20, 29, 30])
    def test_after_any_layer(self, tiny_checkpoint: Any, tmp_path: Path, windows: int) -> None:
        """Of 5 windows in 3 layers, there and back."""
        source, ids = tiny_checkpoint("llama-gqa"), random_ids(5, 40, seed=7)
        whole = streamed_moments(source, ids)

        def dies(done: int, _: int) -> None:
            if done >= ids.numel() * windows // 30:
                raise KeyboardInterrupt

        with open_checkpoint(source) as checkpoint:
            for progress in (dies, None):
                model = StreamedModel(checkpoint, dtype=torch.float32, device=CPU)
                moments = empty_moments(checkpoint.spec, {}, group=2)
                how = {**SEEN, "directory": tmp_path / "stream", "progress": progress}
                if progress:
                    with pytest.raises(KeyboardInterrupt):
                        collect_streamed(model, checkpoint.spec, ids, moments, **how)
                    assert begun_windows(tmp_path / "stream") == list(range(5))
                    read = model.reading.n_bytes
                else:
                    collect_streamed(model, checkpoint.spec, ids, moments, **how)
        for site, sums in whole.sites.items():
            assert torch.equal(moments.sites[site].samples, sums.samples)
            for a, b in zip(
                moments.sites[site].outer + moments.sites[site].fisher, sums.outer + sums.fisher, strict=True
            ):
                assert torch.equal(a, b)
        assert model.reading.n_bytes < read or windows < 25  # what was done is not read again


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_come_one_by_one(model_type: str, tmp_path: Path) -> None:
    """Files hold experts by themselves, modules hold them in one piece."""
    model = small_model(model_type)
    model.save_pretrained(tmp_path / "model")
    from safetensors import safe_open

    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as handle:
        assert any(".experts.0." in name for name in handle.keys())  # noqa: SIM118
    windows = random_ids(3, 40, seed=7)
    ours = streamed_moments(tmp_path / "model", windows)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        moments = empty_moments(checkpoint.spec, {}, group=checkpoint.spec.layers[0].n_kv_heads)
        loaded = load_weights(checkpoint.path, dtype="float32")
        whole = collect_moments(loaded, checkpoint.spec, windows, moments, **SEEN)
    for site, sums in whole.sites.items():
        for a, b in zip(ours.sites[site].outer + ours.sites[site].fisher, sums.outer + sums.fisher, strict=True):
            assert torch.equal(a, b)
