"""The kernels for keys in turns in the cache's service, emulated: what the torch reference gives, through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompress
from kvcompress.kernels import layer, turned, turned_ahead
from kvcompress.options import CompressOptions
from kvcompress.runtime import fast
from kvcompress.runtime.attach import attachment_of
from tests import emulator
from tests.tiny_models import PAD, random_ids, save_tiny_checkpoint

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs g++ 12, for the emulator")


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Path:
    directory = tmp_path_factory.mktemp("wide") / "source"
    return save_tiny_checkpoint(directory, "llama-bf16", head_dim=64, max_position_embeddings=512, num_hidden_layers=2)


def decoded(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Prefill, then decode as many tokens at a time as `steps` says: [batch, sum(steps), vocabulary]."""
    cache, ends = attachment_of(model).new_cache(), [ids.shape[1] - sum(steps)]
    positions, logits = (mask.cumsum(1) - 1).clamp_min(0), []
    for n in steps:
        ends.append(ends[-1] + n)
    with torch.no_grad():
        for start, stop in zip([0, *ends], ends, strict=False):
            part = slice(start, stop)
            output = model(
                ids[:, part], attention_mask=mask[:, :stop], position_ids=positions[:, part], past_key_values=cache
            )
            logits.append(output.logits)
    return torch.cat(logits[1:], 1).float()


@pytest.mark.parametrize(
    ("options", "padding", "steps"),
    [
        ({"key_basis": "per_head", "value_basis": "per_head", "keep": 0.3}, 0, [1, 1]),
        ({"group": 2, "keep": 0.5, "ranks_only": True}, 0, [1, 2]),
        ({"keep": 0.3}, 50, [2, 1]),  # with turns the blocks of `latent` are as wide as the kernels take
    ],
)
def test_kernels_give_what_the_reference_gives(
    source: Path, tmp_path: Path, options: dict[str, Any], padding: int, steps: list[int], monkeypatch: Any
) -> None:
    chosen = CompressOptions(metric="weights", turn=128, sinks=2, recent=5, **options)
    kvcompress.compress(source, tmp_path / "out", chosen)
    model = kvcompress.load(tmp_path / "out", dtype=torch.float16)
    ids, mask = random_ids(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, :padding] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    reference = decoded(model, ids, mask, steps)
    calls, attend = [], fast.attention

    def counted(*args: Any) -> Any:
        output = attend(*args)
        calls.append(output is not None)
        return output

    monkeypatch.setattr(layer, "compiler_works", lambda device: True)
    used, ahead = set(), dict[str, str]()

    def kernels(constants: Any, names: Any, *where: Any) -> Any:
        used.add(turned.kernel_source(constants, names))
        return emulator.kernels(constants, names, *where)

    monkeypatch.setattr(turned, "_kernels", kernels)
    monkeypatch.setattr(turned_ahead, "compile_ahead", lambda sources, _: ahead.update(sources) or len(sources))
    layers = [(codecs, model.config.num_attention_heads) for codecs in attachment_of(model).codecs]
    assert turned_ahead.compile_turned(layers, model.dtype) == len(ahead) > 0
    monkeypatch.setattr(fast, "attention", counted)
    fused = decoded(model, ids, mask, steps)
    assert calls == [True] * (2 * len(model.model.layers))
    assert used.isdisjoint(ahead) if padding else used >= set(ahead)  # of masks there are others
    assert (fused - reference).norm() / reference.norm() < 0.01  # both round to float16 after every layer
