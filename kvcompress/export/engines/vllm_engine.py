"""Run an exported checkpoint in stock vLLM (CPU build). Usage: see __init__.py beside this file."""

import json
import os
import sys
from pathlib import Path
from typing import Any

#: One process, so that the model's logits can be seen; a cache of 1 GiB is plenty for one text.
_CACHE_GIB = 1
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_CACHE_GIB))

import numpy as np  # noqa: E402
import vllm  # noqa: E402


def main(request_file: str, result_file: str, logits_file: str | None = None) -> None:
    request = json.loads(Path(request_file).read_text())
    ids, n_prompt = request["ids"], request["n_prompt"]
    engine = vllm.LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(len(ids) + 1, n_prompt + request["n_generate"]),
        enable_prefix_caching=False,
        max_num_seqs=1,
        max_num_batched_tokens=max(len(ids) + 1, 2048),
        trust_remote_code=(Path(request["model"]) / "configuration_decilm.py").exists(),
    )
    rows: list[Any] = []
    engine.apply_model(lambda model: _watch(model, rows))
    whole = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    engine.generate({"prompt_token_ids": ids}, whole, use_tqdm=False)
    # the sampled token's row comes by itself, the prompt's rows (all but the last) together
    logits = np.concatenate(sorted(rows, key=len, reverse=True))[: len(ids)]
    rows.clear()
    greedy = vllm.SamplingParams(max_tokens=request["n_generate"], temperature=0.0, ignore_eos=True)
    output = engine.generate({"prompt_token_ids": ids[:n_prompt]}, greedy, use_tqdm=False)
    if logits_file:
        np.save(logits_file, logits)
    cache = engine.llm_engine.vllm_config.cache_config
    n_tokens = cache.num_gpu_blocks * cache.block_size
    result = {
        "engine": "vllm",
        "version": vllm.__version__,
        "tokens": list(output[0].outputs[0].token_ids),
        "bytes_per_token": engine.collective_rpc(_cache_bytes)[0] / n_tokens,
        "cache_dtype": "float32",
        "said": f"CPU KV cache size: {n_tokens:,} tokens in {_CACHE_GIB} GiB",
    }
    Path(result_file).write_text(json.dumps(result))


def _cache_bytes(worker: Any) -> int:
    """Return the bytes of the tensors that vLLM has allocated for its cache."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in worker.model_runner.kv_caches}
    return sum(storage.nbytes() for storage in storages.values())


def _watch(model: Any, rows: list[Any]) -> None:
    """Keep what the model's logits are from now on."""
    compute = model.compute_logits

    def watched(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        rows.append(logits.detach().float().cpu().numpy().copy())
        return logits

    model.compute_logits = watched


if __name__ == "__main__":
    main(*sys.argv[1:])
