"""A whole model on a GPU through each kernel path: growing, fixed capacity, recorded; against the torch reference."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcompress
from kvcompress.compat import cache_argument
from kvcompress.kernels import turned
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.options import CompressOptions
from kvcompress.runtime import attach as attach_module
from kvcompress.runtime import fast, recording
from kvcompress.runtime.attach import attachment_of
from kvcompress_cli.generate import continue_prompt
from kvcompress_cli.loading import load_compressed
from tests.tiny_models import PAD, random_ids, save_tiny_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run tests/gpu")

PATHS: dict[str, dict[str, Any]] = {
    "frequency": {"key_basis": "frequency", "keep": 0.3},  # the Triton kernels
    "frequency, ranks only": {"key_basis": "frequency", "keep": 0.5, "ranks_only": True},
    "turns": {"turn": 128, "keep": 0.3},  # the CUDA kernels
    "turns, ranks only": {"turn": 128, "keep": 0.5, "ranks_only": True},
}
#: Of these the kernels do nothing, and no step is recorded.
REFERENCE = {"key_basis": "band", "keep": 0.5}


@pytest.fixture(scope="module")
def output(tmp_path_factory: Any) -> Any:
    """output(**options): a compressed bfloat16 llama with heads of 64 channels, made once."""
    directory = tmp_path_factory.mktemp("gpu")
    source = save_tiny_checkpoint(directory / "source", "llama-bf16", head_dim=64, max_position_embeddings=1024)
    made: dict[str, Path] = {}

    def compressed(**options: Any) -> Path:
        target = made.setdefault(repr(options), directory / str(len(made)))
        if not target.exists():
            chosen = CompressOptions(metric="weights", sinks=2, recent=5, **options)
            kvcompress.compress(source, target, chosen)
        return target

    return compressed


@pytest.fixture(scope="module")
def load(output: Any) -> Any:
    """load(**options): the model of such an output on the GPU."""

    def loaded(**options: Any) -> Any:
        model = kvcompress.load(output(**options), device="cuda")
        model.generation_config.eos_token_id = None
        return model

    return loaded


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every attention over packed codes: whether kernels did it."""
    calls, attend = [], fast.attention

    def counted(*args: Any) -> Any:
        output = attend(*args)
        calls.append(output is not None)
        return output

    monkeypatch.setattr(fast, "attention", counted)
    return calls


def needs_compiler(path: str) -> None:
    if path.startswith("turns") and not compiler_works(torch.device("cuda", 0)):
        pytest.skip("this torch compiles no CUDA source")


def decoded(model: Any, ids: Tensor, n_prompt: int, capacity: int | None = None) -> Tensor:
    cache = cache_argument(model, attachment_of(model).new_cache(capacity=capacity))
    with torch.no_grad():
        logits = [model(ids[:, :n_prompt], **cache).logits[:, -1]]
        logits += [model(token, **cache).logits[:, -1] for token in ids[:, n_prompt:].split(1, 1)]
    return torch.stack(logits, 1).float()


@pytest.mark.parametrize("path", PATHS)
def test_growing_fixed_and_recorded_are_the_reference(
    load: Any, fused: list[bool], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler(path)
    model, ids = load(**PATHS[path]), random_ids(2, 400).cuda()
    growing = decoded(model, ids, 300)
    assert fused and all(fused)
    fixed = decoded(model, ids, 300, capacity=400)
    decoder = kvcompress.GraphDecoder(model, capacity=400)
    recorded = torch.stack([decoder.prefill(ids[:, :300]), *(decoder.step(t) for t in ids[:, 300:].unbind(1))], 1)
    assert decoder.recorded
    monkeypatch.setattr(fast, "attention", lambda *_: None)
    reference = decoded(model, ids, 300)
    for name, logits in {"growing": growing, "fixed": fixed, "recorded": recorded.float()}.items():
        error = ((logits - reference).norm() / reference.norm()).item()
        print(f"{path}: {name} {error:.4f} off the reference")
        # Everything is bfloat16, and what a step rounds otherwise moves codes across borders.
        assert error < 0.05, name
    assert ((recorded.float() - fixed).norm() / fixed.norm()).item() < 0.02


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    caches, new = [], attach_module.recorded_cache

    def recorded_cache(*args: Any) -> Any:
        caches.append(new(*args))
        return caches[-1]

    monkeypatch.setattr(attach_module, "recorded_cache", recorded_cache)
    return caches


MODES: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "temperature": 1.2, "top_k": 50}]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_generate_replays_and_says_the_same(
    load: Any, path: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same steps over the same kind of cache, which are run instead of replayed; with room for few."""
    needs_compiler(path)
    monkeypatch.setattr(recording, "_LEAST_ROOM", 40)
    model, ids, caches = load(**PATHS[path]), random_ids(4, 200).cuda(), watched(monkeypatch)
    options = {"max_new_tokens": 120, "min_new_tokens": 120, "pad_token_id": PAD, **mode}

    def generate() -> Tensor:
        torch.manual_seed(0)
        return model.generate(ids, **options)

    replayed = generate()
    assert caches[0].n_replays > 100 and caches[0].tokens.capacity > 240
    monkeypatch.setattr(recording, "WARM_UP", 1000)
    run = generate()
    assert caches[1].n_replays == 0
    assert torch.equal(replayed, run)


def test_what_decodes_is_compiled_before_the_first_token(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    turned._kernels.cache_clear()
    model, ids = load(**PATHS["turns"]), random_ids(1, 200).cuda()
    attachment_of(model).generation_cache(ids, max_new_tokens=9)
    ahead = set(tmp_path.rglob("*.cubin"))
    model.generate(ids, max_new_tokens=9, do_sample=False)
    assert ahead and set(tmp_path.rglob("*.cubin")) == ahead


def test_without_kernels_nothing_is_recorded(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, caches = load(**REFERENCE), random_ids(1, 100).cuda(), watched(monkeypatch)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "pad_token_id": PAD, "do_sample": False}
    tokens = model.generate(ids, **options)
    assert caches[0].n_replays == 0
    growing = model.generate(ids, **options, **cache_argument(model, attachment_of(model).new_cache()))
    assert torch.equal(tokens[:, :110], growing[:, :110])


def test_the_command_replays(output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_compressed(output(**PATHS["frequency"]), base=None, device="cuda", dtype="auto")
    caches = watched(monkeypatch)
    loaded.model.generation_config.eos_token_id = None
    result = continue_prompt(loaded, "the sea was calm " * 20, max_new_tokens=60)
    assert result.new_tokens == 60 and caches[0].n_replays > 50
    assert result.measured_bytes == caches[0].nbytes()


def test_padded_prompts_take_the_growing_cache(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, caches = load(**PATHS["frequency"]), watched(monkeypatch)
    ids = random_ids(2, 100)
    ids[0, :9] = PAD
    mask = (ids != PAD).long().cuda()
    model.generate(ids.cuda(), attention_mask=mask, max_new_tokens=40, pad_token_id=PAD, do_sample=False)
    assert caches == [None]


def test_threads_that_record_at_once(load: Any) -> None:
    """Several threads generate with one model, each recording its own steps."""
    model = load(**PATHS["frequency"])
    prompts = [random_ids(1 + i % 2, 90 + 30 * i, seed=i).cuda() for i in range(4)]
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "pad_token_id": PAD, "do_sample": False}
    alone = [model.generate(ids, **options) for ids in prompts]
    results: dict[int, Any] = {}

    def run(i: int) -> None:
        try:
            results[i] = [model.generate(prompts[i], **options) for _ in range(3)]
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert not isinstance(results[i], BaseException), results[i]
        assert all(torch.equal(tokens, expected) for tokens in results[i])


def test_threads_may_be_the_first_to_solve_on_a_gpu() -> None:
    """In a process of its own: torch loads its solvers once, and two threads at once broke it."""
    code = (
        "import torch; from kvcompress.side_by_side import side_by_side; torch.set_num_threads(2); d = 'cuda'\n"
        "solve = lambda i: torch.linalg.solve(torch.eye(9, device=d), torch.full((9, 1), float(i), device=d))\n"
        "assert [float(x[0]) for x in side_by_side(solve, range(64), width=9, device=d)] == list(range(64))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
