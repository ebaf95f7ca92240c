"""What the fuzzer damages: a model, outputs of every form, and a file of every other kind that is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

import kvcompress
from kvcompress.calibration.calibrate import obtain_moments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.evaluations import record_evaluation
from kvcompress.heal.options import HealOptions
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.report import page
from kvcompress.report.healing import write_healing
from kvcompress.runtime.attach import detach
from tests.tiny_models import build_tokenizer, prose, save_tiny_checkpoint

_TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
OUTPUTS: dict[str, dict[str, Any]] = {
    "coded": {"recent": 4},
    "turned": {"recent": 4, "turn": 32},
    "ranks": {"recent": 4, "ranks_only": True},
    "rotated": {"recent": 4, "key_basis": "frequency"},
    "folded": {"key_basis": "frequency", "folded": True},
    "maps": {"recent": 4, "maps_only": True},
}
shared = SimpleNamespace()


def prepare(directory: Path) -> None:
    """Make what is damaged: a model, outputs of every form, and a file of every other kind."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    page.charting_library = lambda: ""  # a megabyte in every page, and nothing of it is a stranger's
    shared.root, shared.outside = directory, directory / "outside"
    shared.outside.mkdir(parents=True)
    shared.model_directory = save_tiny_checkpoint(directory / "model", "llama-gqa")
    other = save_tiny_checkpoint(directory / "other-model", "llama-gqa", seed=1)
    for name, options in OUTPUTS.items():
        chosen = CompressOptions(metric="weights", policy="uniform", keep=0.5, **options)
        compress(shared.model_directory, directory / name, chosen)
        compress(other, directory / f"other-{name}", chosen)
        record_evaluation(directory / name, "perplexity", _perplexity())
    save_tiny_checkpoint(directory / "sharded", "llama-sharded")
    _text_files(directory)
    options = calibration_options()
    with open_checkpoint(shared.model_directory) as checkpoint:
        obtain_moments(checkpoint, directory / "moments" / "out", options, device="cpu")
    (shared.moments,) = (directory / "moments").glob("kvcompress-moments-*.safetensors")
    shared.model = kvcompress.load(directory / "coded")
    detach(shared.model)
    shared.tokenizer = build_tokenizer()
    shared.tokenizer.chat_template = _TEMPLATE


def _perplexity() -> dict[str, Any]:
    figures = {"perplexity": {"original": 9.5, "compressed": 9.75, "ratio": 1.026}, "kl_nats": 0.02}
    protocol = {"text": "a.txt", "text_sha256": "ab" * 32, "seq_len": 64, "windows": 3, "sinks": 4, "recent": 4}
    return figures | {"top1_agreement": 0.98, "ratio_standard_error": 0.01, "protocol": protocol | {"dtype": "float32"}}


def calibration_options() -> CompressOptions:
    return CompressOptions(calibration=(str(shared.root / "prose.txt"),), tokens=64, seq_len=32, recent=4)


def _text_files(directory: Path) -> None:
    (directory / "prose.txt").write_text(prose(300))
    records = [{"text": prose(60, seed=i)} for i in range(6)]
    records += [
        {"messages": [{"role": "user", "content": prose(30)}, {"role": "assistant", "content": prose(30, seed=2)}]}
    ]
    records += [
        {"prompt": prose(20), "completion": prose(20)},
        {"conversations": [{"from": "human", "value": prose(9)}]},
    ]
    (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tasks = [
        {"query": "a", "choices": ["b", "c"], "gold": 1},
        {"contexts": ["a", "b"], "target": "c", "gold": 0},
        {"context": "a", "target": "b"},
    ]
    for i, task in enumerate(tasks):
        (directory / f"task{i}.jsonl").write_text((json.dumps(task) + "\n") * 3)
    (directory / "TASKS.json").write_text(json.dumps({f"task{i}.jsonl": {"format": "mc"} for i in range(1)}))
    figures = {"before": {"ratio": 1.05, "kl_nats": 0.06}, "after": {"ratio": 1.03, "kl_nats": 0.04}}
    protocol = {"windows": 8, "seq_len": 2048, "sinks": 4, "recent": 64, "dtype": "bfloat16"}
    stage = {"train": "maps", "kept": True, "tokens": 12345, "seconds": 67.8, "options": HealOptions().to_json()}
    write_healing(directory, [stage | {"protocol": protocol, "texts": {"books.txt": figures}}] * 2)
    header = {"format": "kvcompress answers", "version": 1}
    lines = [header, ["side", "request", [-1.5, True]], ["side", "text-1", "an answer"]]
    (directory / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
