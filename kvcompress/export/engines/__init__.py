"""One script for each engine, run by the engine's own Python: they import the engine and nothing of kvcompress.

    PYTHON SCRIPT.py REQUEST.json RESULT.json [LOGITS.npy]

REQUEST: {"model": path, "ids": token ids, "n_prompt": ids that the greedy run begins with, "n_generate": steps,
"text": what an engine with a tokenizer of its own cuts into "text_ids"}. RESULT: {"engine", "version", "tokens",
"bytes_per_token", "cache_dtype", "said"}; `said` is what the engine itself reports of its cache. LOGITS: float32
[len(ids), vocabulary].
"""
