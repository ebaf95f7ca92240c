"""Two processes train what one trains: the same windows in every step, gradients averaged, one output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import kvcompress
from kvcompress.checkpoint.maps import MAPS_FILE
from kvcompress.heal.options import HealOptions
from kvcompress.options import CompressOptions
from tests.tiny_models import prose

PROGRAM = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import kvcompress
from kvcompress.heal.options import HealOptions
directory, output, options = sys.argv[1:]
options = json.loads(options)
options["text"] = tuple(options["text"])
kvcompress.heal(directory, output, HealOptions(**options), device="cpu")
"""


def test_two_processes_train_as_one(tiny_checkpoint: Any, tmp_path: Path) -> None:
    directory, text = tmp_path / "out", tmp_path / "prose.txt"
    kvcompress.compress(
        tiny_checkpoint("llama-gqa"), directory, CompressOptions(keep=0.0625, metric="weights", recent=4)
    )
    text.write_text(prose(4000, seed=3), encoding="utf-8")
    few: dict[str, Any] = {"tokens": 10 * 4 * 48, "seq_len": 48, "batch": 4, "device_batch": 2, "held_out": 3}
    # towards the original alone: the text is nothing to a random model
    options = HealOptions(text=(str(text),), **few, evaluations=2, maps_rate=0.02, text_loss=0.0)
    one = kvcompress.heal(directory, tmp_path / "one", options, device="cpu")
    root = str(Path(kvcompress.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = [tmp_path / "program.py", directory, tmp_path / "two", json.dumps(options.to_json())]
    subprocess.run([*command, *map(str, arguments)], check=True, env=os.environ | {"PYTHONPATH": path}, timeout=300)
    two = json.loads((tmp_path / "two" / "healing.json").read_text())["stages"][0]
    assert one.kept and two["kept"] and two["tokens"] == one.stage["tokens"]
    first, second = (load_file(tmp_path / name / MAPS_FILE) for name in ("one", "two"))
    start = load_file(directory / MAPS_FILE)
    for name in ("layers.0.key.decoder", "layers.2.value.encoder", "layers.1.key.mean"):
        moved = (first[name] - start[name]).norm()
        assert float((second[name] - first[name]).norm() / moved) < 0.05, name
    assert torch.equal(first["layers.0.key.bits"], second["layers.0.key.bits"])
