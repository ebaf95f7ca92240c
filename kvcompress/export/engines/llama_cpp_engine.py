"""Run an exported GGUF file in stock llama.cpp, through llama-cpp-python. Usage: see __init__.py beside this file.

The cache is kept in float32 here, to compare arithmetic and not rounding; llama.cpp's default is f16.
"""

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_F32 = 0


def main(request_file: str, result_file: str, logits_file: str | None = None) -> None:
    request = json.loads(Path(request_file).read_text())
    said: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: Any) -> None:
        said.append(text.decode("utf-8", "replace"))

    ids, n_prompt = request["ids"], request["n_prompt"]
    n_ctx = -(-max(len(ids), n_prompt + request["n_generate"]) // 256) * 256

    def load(**settings: Any) -> llama_cpp.Llama:
        said.clear()
        return llama_cpp.Llama(request["model"], n_ctx=n_ctx, n_batch=n_ctx, type_k=_F32, type_v=_F32, **settings)

    # Flash attention is llama-server's default and decides the cache's layout; without it, values of all layers are
    # padded to the widest one. It rounds to 16 bits inside, so the logits are compared without it.
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    load(flash_attn=True).close()
    cache = re.search(r"size = *([\d.]+) MiB \( *(\d+) cells.*", "".join(said))
    if cache is None:
        raise SystemExit("llama.cpp logged no size of its cache")
    model = load(flash_attn=False, logits_all=True, verbose=False)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], dtype=np.float32)
    model.reset()
    model.eval(ids[:n_prompt])
    tokens: list[int] = []
    for _ in range(request["n_generate"]):
        tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(tokens[-1:])
    if logits_file:
        np.save(logits_file, logits)
    result: dict[str, Any] = {
        "engine": "llama.cpp",
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "tokens": tokens,
        "bytes_per_token": float(cache[1]) * 2**20 / int(cache[2]),
        "cache_dtype": "float32",
        "said": cache[0].strip(),
    }
    if request.get("text"):
        result["text_ids"] = model.tokenize(request["text"].encode(), add_bos=False, special=False)
    model.close()
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
