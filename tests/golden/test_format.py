"""Format version 3, pinned: a file written by any release must read the same in every later one.

`v3/` holds the two files byte for byte as `golden_plan` and `golden_maps` write them; `tiny_llama.json` the names,
dtypes and shapes of what compress() makes of a fixed model. A change here is a change of the format: it needs a new
format version and a reader for the old one.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, load_maps, save_maps
from kvcompress.codec.packing import pack_codes, unpack_codes
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import FORMAT_VERSION, PLAN_FILE, REPORT_FILE, Plan
from kvcompress.site_plan import SitePlan

GOLDEN = Path(__file__).parent


def golden_plan() -> Plan:
    sites = (
        SitePlan(0, "key", "latent", 4, ((8, 1), (2, 2)), 0.125, 4, False, 64),
        SitePlan(0, "value", "per_head", 4, ((16, 2),), 0.5, 2, False),
        SitePlan(1, "key", "latent", 4, ((16, 4),), 0.0, 4, False),
        SitePlan(1, "value", "per_head", 4, (), 2.0, 2, False),
    )
    return Plan(
        form="coded",
        source="org/tiny",
        source_fingerprint="ab" * 32,
        architecture="llama",
        dtype="bfloat16",
        sites=sites,
        sinks=4,
        recent=64,
        options={"keep": 0.6, "calibration": ["a.txt"]},
        calibration={"mode": "fisher", "tokens": 1024},
        loss_in_nats=True,
        maps_bytes=189,
        weight_bytes=5000,
    )


def golden_maps() -> dict[Site, SiteMaps]:
    def site(blocks: list[list[int]], block: list[int], bits: list[int], mean: bool) -> SiteMaps:
        shape = (len(block), len(blocks[0]))
        numbers = torch.arange(shape[0] * shape[1], dtype=torch.float16).reshape(shape) / 8
        return SiteMaps(
            blocks=torch.tensor(blocks, dtype=torch.int32),
            encoder=numbers,
            decoder=-numbers,
            block=torch.tensor(block, dtype=torch.int32),
            bits=torch.tensor(bits, dtype=torch.uint8),
            step=torch.tensor([1.0 if b == 16 else 0.25 * b for b in bits]),
            mean=torch.tensor([0.5, -1.0, 0.0, 2.0]) if mean else None,
        )

    return {
        Site(0, "key"): site([[0, 1, 2, 3]], [0, 0, 0], [8, 2, 2], mean=True),
        Site(0, "value"): site([[0, 1], [2, 3]], [1, 0], [16, 16], mean=True),
        Site(1, "value"): site([[0, 1], [2, 3]], [], [], mean=False),
    }


def header(file: Path) -> dict[str, Any]:
    """Return the JSON header of a safetensors file, without the library."""
    data = file.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n])


def test_plan_is_written_byte_for_byte(tmp_path: Path) -> None:
    golden_plan().save(tmp_path)
    assert (tmp_path / PLAN_FILE).read_bytes() == (GOLDEN / "v3" / PLAN_FILE).read_bytes()


def test_maps_are_written_byte_for_byte(tmp_path: Path) -> None:
    save_maps(golden_maps(), tmp_path / MAPS_FILE)
    assert (tmp_path / MAPS_FILE).read_bytes() == (GOLDEN / "v3" / MAPS_FILE).read_bytes()


def test_golden_plan_is_read() -> None:
    assert FORMAT_VERSION == 5
    assert Plan.load(GOLDEN / "v3") == golden_plan()


def test_golden_maps_are_read() -> None:
    maps = load_maps(GOLDEN / "v3")
    assert list(maps) == sorted(golden_maps())
    for site, expected in golden_maps().items():
        for name in ("blocks", "encoder", "decoder", "block", "bits", "step"):
            ours, theirs = getattr(maps[site], name), getattr(expected, name)
            assert torch.equal(ours, theirs.to(ours.dtype))
        assert (maps[site].mean is None) == (expected.mean is None)
    assert torch.equal(maps[Site(0, "key")].mean, torch.tensor([0.5, -1.0, 0.0, 2.0]))
    assert maps[Site(0, "key")].encoder.dtype == torch.float16


def test_maps_bytes_are_those_of_the_file() -> None:
    """What a plan calls maps_bytes is the file's tensors, header aside."""
    data = (GOLDEN / "v3" / MAPS_FILE).read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    assert sum(m.nbytes for m in golden_maps().values()) == len(data) - 8 - n == golden_plan().maps_bytes


def shapes(file: Path) -> dict[str, list[Any]]:
    """Return {tensor: [dtype, shape]}."""
    return {n: [t["dtype"], t["shape"]] for n, t in sorted(header(file).items()) if n != "__metadata__"}


def key_tree(value: Any) -> Any:
    """Return the keys of nested objects, and of a list its first element's."""
    if isinstance(value, dict):
        return {k: key_tree(v) for k, v in sorted(value.items())}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [key_tree(value[0])]
    return type(value).__name__


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bf16"])
def test_compress_writes_the_format(tiny_checkpoint: Any, tmp_path: Path, family: str) -> None:
    """Equal ranks from the weights alone, so that nothing here depends on arithmetic."""
    options = CompressOptions(metric="weights", policy="uniform", keep=0.5, key_basis="band", band=4, ranks_only=True)
    compress(tiny_checkpoint(family), tmp_path / "out", options)
    plan = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    for document, name in ((plan, "calibration"), (plan, "options"), (report, "calibration"), (report, "options")):
        document[name].clear()  # what was chosen, not how it is written
    report["energies"].clear()
    tensors = shapes(tmp_path / "out" / MAPS_FILE)
    layers = [{n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"layers.{i}.")} for i in range(3)]
    assert layers[0] == layers[1] == layers[2] and sum(map(len, layers)) == len(tensors)
    found = {
        "files": sorted(p.name for p in (tmp_path / "out").iterdir()),
        "maps of a layer": layers[0],
        "metadata": header(tmp_path / "out" / MAPS_FILE)["__metadata__"],
        "plan": key_tree(plan),
        "report": key_tree(report),
        "bits": [[s["layer"], s["part"], s["width"], s["bits"], s["block_width"]] for s in plan["sites"]],
    }
    assert found == json.loads((GOLDEN / "tiny_llama.json").read_text())[family]


def test_a_packed_block_byte_for_byte() -> None:
    """docs/format.md, on 32 tokens of five components of 16, 8, 4, 2 and 1 bits, and the gains."""
    token = np.arange(32)
    numbers = (token / 8).astype(np.float16)
    codes = {8: (token * 7 + 3) % 256, 4: (token * 5) % 16, 2: (token // 3) % 4, 1: (token * token) % 2}
    gains = (token * 3 + 1) % 16
    expected = numbers.tobytes()
    for bits, values in [*codes.items(), (4, gains)]:
        number = sum(int(v) << (bits * t) for t, v in enumerate(values))  # token t at bit t * bits, lowest first
        expected += number.to_bytes(4 * bits, "little")
    columns = [torch.tensor(numbers), *(torch.tensor(c) for c in codes.values()), torch.tensor(gains)]
    widths = [16, *codes, 4]
    packed = torch.cat([pack_codes(c.reshape(1, 32, 1), b) for c, b in zip(columns, widths, strict=True)], -1)
    assert packed.dtype == torch.uint8 and packed.shape == (1, 1, 4 * sum(widths))
    assert bytes(packed.flatten().tolist()) == expected
    start = 0
    for column, bits in zip(columns, widths, strict=True):
        back = torch.full((1, 32, 1), torch.nan)
        unpack_codes(packed[..., start : start + 4 * bits], bits, back)
        assert torch.equal(back.flatten(), column.float())
        start += 4 * bits
