"""The plan: its arithmetic by hand, its file, and report.json's sums."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import CheckpointError
from kvcompress.model.model_spec import Site
from kvcompress.plan import PLAN_FILE, Plan
from kvcompress.report.document import CONTEXTS, layer_rows, report_document
from kvcompress.site_plan import SitePlan


def site(layer: int, part: Any, rank: int, *, width: int = 16, rotated: bool = False) -> SitePlan:
    return SitePlan(
        layer=layer,
        part=part,
        basis="latent",
        width=width,
        bits=((16, rank),),
        predicted_loss=0.25 * (width - rank),
        block_width=width,
        rotated=rotated,
    )


def plan(**changes: Any) -> Plan:
    """Two layers of 16 numbers in bfloat16: 4 + 8 numbers kept in layer 0, layer 1 whole."""
    values = {
        "form": "coded",
        "source": "org/model",
        "source_fingerprint": "0" * 64,
        "architecture": "llama",
        "dtype": "bfloat16",
        "sites": (site(0, "key", 4), site(0, "value", 8), site(1, "key", 16), site(1, "value", 16)),
        "sinks": 4,
        "recent": 64,
        "options": {"keep": 0.7, "key_basis": "latent", "value_basis": "latent", "policy": "loss", "metric": "fisher"}
        | {"maps_only": False},
        "calibration": {"tokens": 1000, "sources": ["a.txt"]},
        "loss_in_nats": True,
        "maps_bytes": 3000,
        "weight_bytes": 100_000,
    } | changes
    return Plan(**values)


def test_bytes_per_token() -> None:
    assert plan().original_bytes_per_token == 4 * 16 * 2
    assert plan().compressed_bytes_per_token == (4 + 8 + 16 + 16) * 2
    assert plan().keep == 44 / 64
    assert plan().predicted_loss == 0.25 * (12 + 8)
    assert plan().n_layers == 2


@pytest.mark.parametrize(
    ("recent", "n_tokens", "n_encoded"),
    [
        (64, 64, 0),
        (64, 95, 0),
        (64, 96, 32),
        (64, 200, 128),
        (10, 41, 0),
        (10, 42, 32),
        (0, 31, 0),
        (0, 32, 32),
        (0, 0, 0),
    ],
)
def test_encoded_tokens(recent: int, n_tokens: int, n_encoded: int) -> None:
    assert plan(recent=recent).n_encoded(n_tokens) == n_encoded


def test_cache_bytes_by_hand() -> None:
    """200 tokens, 128 of them encoded: latents, 4 sinks and 72 recent tokens exact, positions, layer 1 whole."""
    latents = 128 * (4 + 8) * 2
    exact = (4 + 72) * (16 + 16) * 2
    assert plan().cache_bytes(200) == latents + exact + 200 * (16 + 16) * 2 + 200 * 4


def test_cache_bytes_of_a_short_text_are_the_exact_ones() -> None:
    assert plan().cache_bytes(50) == 50 * 64 * 2 + 50 * 4


def test_cache_bytes_in_another_dtype() -> None:
    """A bfloat16 checkpoint run in float32: latents stay 16-bit, exact numbers take 4 bytes."""
    expected = 128 * 12 * 2 + (76 * 32 + 200 * 32) * 4 + 200 * 4
    assert plan().cache_bytes(200, exact_number_bytes=4) == expected


def test_bits_and_gains_are_counted() -> None:
    """Components of a site take their own bits, and a token of a quantised site 4 more for its gain."""
    key = dataclasses.replace(site(0, "key", 0), bits=((8, 2), (2, 3), (1, 5)))
    assert (key.rank, key.bits_per_token, key.quantised) == (10, 16 + 6 + 5 + 4, True)
    assert key.component_bits == (8, 8, 2, 2, 2, 1, 1, 1, 1, 1)
    quantised = plan(sites=(key, site(0, "value", 8)))
    assert quantised.cache_bytes(200) == 128 * 31 // 8 + 128 * 8 * 2 + (4 + 72) * 32 * 2 + 200 * 4


def test_no_positions_where_keys_are_exact() -> None:
    exact_keys = (site(0, "key", 16), site(0, "value", 8))
    assert plan(sites=exact_keys).cache_bytes(200) == 128 * (16 + 8) * 2 + 76 * 32 * 2


def test_cache_bytes_of_a_folded_model() -> None:
    assert plan(form="folded").cache_bytes(200) == 200 * 44 * 2


def test_a_layer_with_one_exact_part_keeps_it_in_the_models_dtype() -> None:
    mixed = plan(sites=(site(0, "key", 16), site(0, "value", 8)), dtype="float32")
    mixed = dataclasses.replace(mixed, sites=tuple(dataclasses.replace(s, bits=((32, s.rank),)) for s in mixed.sites))
    assert mixed.cache_bytes(200) == 128 * (16 + 8) * 4 + 76 * 32 * 4


def test_round_trip(tmp_path: Path) -> None:
    plan().save(tmp_path)
    assert Plan.load(tmp_path) == plan()
    document = json.loads((tmp_path / PLAN_FILE).read_text())
    assert document["format_version"] == 3
    assert document["bytes_per_token"] == {"original": 128, "compressed": 88}
    assert document["keep"] == plan().keep and document["predicted_loss"] == plan().predicted_loss


def damaged(change: Any) -> Any:
    """Return a function that changes the parsed document of a plan's file."""

    def write(file: Path) -> None:
        document = json.loads(file.read_text())
        file.write_text(json.dumps(change(document)))

    return write


def drop(name: str) -> Any:
    return damaged(lambda d: {k: v for k, v in d.items() if k != name})


DAMAGES = {
    "empty": lambda f: f.write_text(""),
    "half": lambda f: f.write_text(f.read_text()[: len(f.read_text()) // 2]),
    "binary": lambda f: f.write_bytes(b"\x00\xff\xfe"),
    "list": lambda f: f.write_text("[]"),
    "number": lambda f: f.write_text("3"),
    "null": lambda f: f.write_text("null"),
    "no version": drop("format_version"),
    "no sites": drop("sites"),
    "no keep": drop("keep"),
    "sites of a wrong kind": damaged(lambda d: d | {"sites": 7}),
    "a site of a wrong kind": damaged(lambda d: d | {"sites": ["x"]}),
    "no sites at all": damaged(lambda d: d | {"sites": []}),
    "a site without bits": damaged(lambda d: d | {"sites": [{k: v for k, v in d["sites"][0].items() if k != "bits"}]}),
    "bits that are no numbers": damaged(lambda d: d | {"sites": [d["sites"][0] | {"bits": [["four", 1]]}]}),
    "an unknown dtype": damaged(lambda d: d | {"dtype": "int3"}),
    "an unknown field": damaged(lambda d: d | {"surprise": 1}),
    "a turn that no blocks fill": damaged(lambda d: d | {"sites": [d["sites"][0] | {"turn": 48}]}),
    "an earlier version": damaged(lambda d: d | {"format_version": 2}),
    "a later version": damaged(lambda d: d | {"format_version": 6}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    plan().save(tmp_path)
    DAMAGES[damage](tmp_path / PLAN_FILE)
    with pytest.raises(
        CheckpointError, match="this kvcompress reads versions 3 to 5" if "er version" in damage else "damaged"
    ) as error:
        Plan.load(tmp_path)
    assert "\n" not in str(error.value) and PLAN_FILE in str(error.value)


def test_a_directory_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an output of kvcompress"):
        Plan.load(tmp_path)


class TestReport:
    document = report_document(plan(), {Site(0, "key"): [1.23456, 0.000012345]})

    def test_rows_add_up_to_the_whole(self) -> None:
        parts = [row[part] for row in self.document["layers"] for part in ("key", "value")]
        assert sum(p["bits_per_token"] for p in parts) == 8 * self.document["bytes_per_token"]["compressed"]
        assert sum(p["width"] * 2 for p in parts) == self.document["bytes_per_token"]["original"]
        assert sum(p["predicted_loss"] for p in parts) == self.document["predicted_loss_nats"]
        assert self.document["keep"] == plan().keep

    def test_layers_in_order_with_both_parts(self) -> None:
        shuffled = plan(sites=plan().sites[::-1])
        assert [row["layer"] for row in layer_rows(shuffled)] == [0, 1]
        assert layer_rows(plan())[0]["key"]["rank"] == 4 and layer_rows(plan())[0]["value"]["rank"] == 8
        assert [row["key"]["basis"] for row in layer_rows(plan())] == ["latent", "exact"]

    def test_what_the_budget_left(self) -> None:
        assert self.document["bytes_left_per_token"] == int(0.7 * 128) - 88

    def test_sizes_at_four_contexts(self) -> None:
        rows = self.document["cache_bytes"]
        assert [row["tokens"] for row in rows] == list(CONTEXTS) == [2048, 8192, 32768, 131072]
        assert [row["original"] for row in rows] == [128 * n for n in CONTEXTS]
        assert [row["compressed"] for row in rows] == [plan().cache_bytes(n) for n in CONTEXTS]

    def test_maps_and_arithmetic(self) -> None:
        assert self.document["maps"] == {"bytes": 3000, "share_of_weights": 0.03}
        flops = self.document["flops_per_cached_token"]
        assert flops["rebuild_keys"] == 2 * 4 * 16  # the exact layer rebuilds nothing
        turns = plan(sites=(dataclasses.replace(site(0, "key", 4), turn=64), *plan().sites[1:]))
        assert report_document(turns, {})["flops_per_cached_token"]["rebuild_keys"] == 0
        assert flops["attention_on_latent_values"] == 2 * (8 + 16)

    def test_names_the_model_and_not_where_it_lay(self) -> None:
        assert self.document["model"] == "org/model"
        assert report_document(plan(source="/home/someone/model-7b"), {})["model"] == "model-7b"

    def test_energies_keep_four_digits(self) -> None:
        assert self.document["energies"] == {"layers.0.key": [1.235, 1.234e-05]}

    def test_loss_without_a_unit_is_not_called_nats(self) -> None:
        assert report_document(plan(loss_in_nats=False), {})["predicted_loss_nats"] is None

    def test_is_json(self) -> None:
        assert json.loads(json.dumps(self.document)) == self.document
