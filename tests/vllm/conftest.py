"""A tiny model, compressed in several ways, and vLLM running it in this process. tests/vllm/run installs vLLM."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, save_maps
from kvcompress.checkpoint.writer import atomic_directory
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attachment_of
from kvcompress.runtime.load import load
from kvcompress.site_plan import SitePlan
from tests.tiny_models import prose, random_ids, save_tiny_checkpoint

HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:  # not where these tests are only collected: the other tests of the process compile
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without vLLM nothing here can run; a second interpreter has it, see tests/vllm/run."""
    if not HAS_VLLM:
        skip = pytest.mark.skip(reason="vLLM is not installed here: bash tests/vllm/run")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


SIZES = {
    "hidden_size": 128,  # heads of 32, which vLLM's own attention on CPUs takes, too
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("vllm") / "tiny", "llama-gqa", **SIZES)


@pytest.fixture(scope="session")
def compressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compressed(**options): the directory of the tiny model compressed so, made once."""
    root = tmp_path_factory.mktemp("compressed")
    text = root / "text.txt"
    text.write_text(prose(5000, seed=1), encoding="utf-8")
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = root / str(len(made))
            common = {"calibration": (str(text),), "tokens": 4096, "seq_len": 512}
            compress(source, made[key], CompressOptions(**common, **options))
        return made[key]

    return make


@pytest.fixture
def full_rank(compressed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model with every component of every site kept as a number, and coded nevertheless: nothing is lost."""
    directory = compressed(keep=1.0, ranks_only=True)
    monkeypatch.setattr(SitePlan, "exact", property(lambda self: False))
    return with_full_maps(directory)


def with_full_maps(directory: Path) -> Path:
    """Return a copy of an output that keeps everything, with maps that keep everything: compress writes none."""
    target = directory.with_name(directory.name + "-coded")
    if target.is_dir():
        return target
    generator = torch.Generator().manual_seed(0)
    plan = Plan.load(directory)
    maps = {}
    for site in plan.sites:
        n, w = site.width, site.block_width
        rotation = torch.linalg.qr(torch.randn(n // w, w, w, generator=generator)).Q.flatten(0, 1)
        maps[site.site] = SiteMaps(
            blocks=torch.arange(n, dtype=torch.int32).view(-1, w),
            encoder=rotation,
            decoder=rotation.clone(),
            block=torch.arange(n, dtype=torch.int32) // w,
            bits=torch.full((n,), 32, dtype=torch.uint8),
            step=torch.ones(n),
            mean=torch.randn(n, generator=generator),
        )
    with atomic_directory(target) as scratch:
        for file in directory.iterdir():
            (scratch / file.name).write_bytes(file.read_bytes())
        save_maps(maps, scratch / MAPS_FILE)
        plan.save(scratch)
    return target


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """engine(directory, **arguments of LLM): a running vLLM, given back when the test is over."""
    from vllm import LLM

    running: list[Any] = []

    def start(directory: Path, **arguments: Any) -> Any:
        common = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 4}
        memory = {"kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.05}  # that much of a GPU must be free
        running.append(LLM(model=str(directory), **(common | memory | arguments)))
        return running[-1]

    yield start
    while running:
        running.pop().llm_engine.engine_core.shutdown()
        gc.collect()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [random_ids(1, n, seed=seed + i)[0].tolist() for i, n in enumerate(lengths)]


def generate(llm: Any, ids: list[list[int]], n_new: int, **sampling: Any) -> list[Any]:
    """Return vLLM's outputs for prompts of ids, greedy unless told otherwise."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=n_new, ignore_eos=True, **({"temperature": 0.0} | sampling))
    return llm.generate([{"prompt_token_ids": x} for x in ids], parameters, use_tqdm=False)  # type: ignore[no-any-return]


def new_tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


@torch.no_grad()
def greedy(model: Any, ids: list[int], n_new: int, pieces: list[int] | None = None) -> list[int]:
    """Return the greedy continuation of transformers; pieces: where the prompt is cut into several forwards.

    A compressed model's own cache is used, an uncompressed one's is transformers'.
    """
    from transformers import DynamicCache

    compressed = "kvcompress_attachment" in model.__dict__
    cache = attachment_of(model).new_cache() if compressed else DynamicCache()
    bounds = [0, *(pieces or []), len(ids)]
    for start, stop in pairwise(bounds):
        logits = model(torch.tensor([ids[start:stop]]), past_key_values=cache).logits[0, -1]
    found: list[int] = []
    for _ in range(n_new):
        found.append(int(logits.argmax()))
        logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits[0, -1]
    return found


def check_twice(llm: Any, model: Any, ids: list[list[int]], n_new: int) -> None:
    """Check that vLLM continues prompts of ids as the run time does, `model`: anew, then over what the first time left.

    The second time whole pages are found, and their window: a prompt goes on where they end.
    """
    assert new_tokens(generate(llm, ids, n_new)) == [greedy(model, x, n_new) for x in ids]
    again = generate(llm, ids, n_new)
    found = [o.num_cached_tokens for o in again]
    assert max(found) >= 256
    expected = [greedy(model, x, n_new, [n] if n else None) for x, n in zip(ids, found, strict=True)]
    assert new_tokens(again) == expected


@pytest.fixture(scope="session")
def plain(source: Path) -> Any:
    """The tiny model in transformers, uncompressed."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def run_time() -> Callable[[Path], Any]:
    """run_time(directory): the model in transformers with its compressed cache."""
    return lambda directory: load(directory, dtype=torch.float32)
