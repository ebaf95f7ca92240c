"""Run an exported checkpoint in stock transformers. Usage: see __init__.py beside this file."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(request_file: str, result_file: str, logits_file: str | None = None) -> None:
    request = json.loads(Path(request_file).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    ids = torch.tensor([request["ids"]])
    with torch.no_grad():
        output = model(ids, use_cache=True)
        layers = output.past_key_values.layers
        n_bytes = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
        step = model(ids[:, : request["n_prompt"]], use_cache=True)
        tokens = []
        for _ in range(request["n_generate"]):
            tokens.append(int(step.logits[0, -1].argmax()))
            step = model(torch.tensor([[tokens[-1]]]), past_key_values=step.past_key_values, use_cache=True)
    if logits_file:
        np.save(logits_file, output.logits[0].float().numpy())
    shape = list(layers[0].keys.shape)
    result = {
        "engine": "transformers",
        "version": transformers.__version__,
        "tokens": tokens,
        "bytes_per_token": n_bytes / ids.shape[1],
        "cache_dtype": "float32",
        "said": f"{type(output.past_key_values).__name__} of {n_bytes} bytes, layer 0 keys {shape}",
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
