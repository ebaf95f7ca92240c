"""`kvcompress bench`, on a CPU: the reference against SDPA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from kvcompress.bench.attention import AttentionTiming
from kvcompress.bench.pages import ChunkTiming, PagedTiming
from kvcompress.bench.random_model import random_plan
from kvcompress.bench.workload import SHAPES, components_at_a_time, random_maps, shape_of_output, typical_counts
from kvcompress.codec.tiles import is_tileable
from kvcompress_cli.bench import print_attention
from tests.models.small import small_model

SMALL = ("--shape", "smollm2-135m", "--context", "64,128", "--batch", "1", "--keep", "0.25", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The copy and the matrix product that set the roofline are large; tests need only their place in the report."""
    monkeypatch.setattr("kvcompress.bench.attention.copy_bytes_per_second", lambda device: 2e9)
    monkeypatch.setattr("kvcompress.bench.attention.matrix_flops_per_second", lambda device: 1e12)
    monkeypatch.setattr("kvcompress.bench.run.copy_bytes_per_second", lambda device: 2e9)
    monkeypatch.setattr("kvcompress.bench.run.matrix_flops_per_second", lambda device: 1e12)
    monkeypatch.setattr("kvcompress.bench.decode._free", lambda device: None)  # collects garbage, all of this process
    monkeypatch.setattr("kvcompress.bench.decode.STEPS", 2)


def test_json_has_a_row_for_every_combination(kvcompress):
    outcome = kvcompress("bench", *SMALL, "--json")
    assert outcome.code == 0 and outcome.stderr == ""
    document = json.loads(outcome.stdout)
    rows = document["attention"]
    assert [(r["keep"], r["context"], r["batch"]) for r in rows] == [(0.25, 64, 1), (0.25, 128, 1)]
    for row in rows:
        assert row["speedup"] == pytest.approx(min(row["sdpa_microseconds"].values()) / row["microseconds"])
        assert row["roofline_microseconds"] >= row["packed_bytes"] / 2e9 * 1e6 * 0.999
    # a quarter of 16 bits for each of 192 keys and values, less what is too little for a quad of every head
    extra = rows[1]["packed_bytes"] - rows[0]["packed_bytes"]
    assert 0.98 * 64 * 2 * 192 * 2 * 0.25 < extra <= 64 * 2 * 192 * 2 * 0.25
    assert document["prefill"][0]["encode_milliseconds"] > 0


@pytest.mark.parametrize(("options", "turn"), [({"turn": 32}, 32), ({"key_basis": "frequency"}, 1)], ids=str)
def test_an_output_is_timed_at_its_own_plan(kvcompress, compressed, options, turn):
    flags = ("--context", "64", "--batch", "2", "--device", "cpu", "--json")
    document = json.loads(kvcompress("bench", compressed(**options), *flags).stdout)
    assert [r["batch"] for r in document["attention"]] == [2]
    assert 0 < document["attention"][0]["keep"] < 1
    assert document["turn"] == turn


def test_latent_attention_is_not_timed(kvcompress, fails, model, text, tmp_path):
    small_model("deepseek_v2").save_pretrained(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    flags = ("--calibration", text, "--tokens", "256", "--seq-len", "64", "--recent", "8")
    assert kvcompress("compress", tmp_path / "model", tmp_path / "out", *flags).code == 0
    assert "latent attention" in fails("bench", tmp_path / "out")


def test_keys_that_are_rebuilt_are_not_timed_as_others(fails, compressed):
    assert "rebuilt before they are read" in fails("bench", compressed(turn=1))


def test_an_output_of_a_family_without_a_reader_is_timed(tmp_path):
    """Its sizes are those of the running model, whatever its configuration calls them."""
    shape = SHAPES["tiny"]
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=32, layer_types=["full_attention"] * 2, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    counts = typical_counts(shape.width, 0.25)
    random_plan(shape, counts, counts, torch.float32)[0].save(tmp_path)
    found, keys, values, turn = shape_of_output(tmp_path)
    assert turn == 1
    assert (found.n_heads, found.n_kv_heads, found.head_dim, found.n_layers) == (4, 2, 32, 2)
    assert (found.d_model, found.d_mlp, found.n_vocab) == (128, 192, 64)
    assert keys == values == counts


def test_the_table_names_the_opponent(kvcompress):
    outcome = kvcompress("bench", *SMALL)
    assert outcome.code == 0
    words = " ".join(outcome.stdout.split())
    assert "faster" in words and "(computed)" in words and "un-rotated in turns of 256 tokens" in words


@pytest.mark.parametrize(
    ("ours", "opponent", "theirs"), [(12345678.0, "math", 98765432.0), (12345.0, "efficient", 98765.0)]
)
def test_the_table_fits_80_columns(capsys, monkeypatch, ours, opponent, theirs):
    """Nothing is cut: neither seconds on a processor nor the longest of the names on a GPU."""
    monkeypatch.setenv("COLUMNS", "80")
    others = {"packed_bytes": 1, "cache_bytes": 1, "flops": 1, "bound_by": "arithmetic", "copy_share": 0.5}
    times = {"sdpa_microseconds": {opponent: theirs}, "roofline_microseconds": 1234.5}
    print_attention([AttentionTiming(0.125, 131072, 32, ours, **times, **others)])
    table = capsys.readouterr().out
    assert "…" not in table and f"{ours:.0f}" in table and f"{theirs:.0f}" in table and "arithmetic" in table


def test_decode_times_a_whole_model(kvcompress):
    tiny = ("--shape", "tiny", "--context", "64", "--batch", "1", "--keep", "0.25", "--device", "cpu")
    document = json.loads(kvcompress("bench", *tiny, "--json").stdout)
    assert document["decode"] == []
    document = json.loads(kvcompress("bench", *tiny, "--decode", "--decode-batch", "3", "--json").stdout)
    rows = document["decode"]
    assert [(r["cache"], r["keep"], r["context"], r["batch"]) for r in rows] == [
        ("recorded", 1.0, 64, 3), ("preallocated", 1.0, 64, 3), ("dynamic", 1.0, 64, 3), ("compressed", 0.25, 64, 3),
        ("fixed", 0.25, 64, 3),
    ]  # fmt: skip
    assert rows[3]["computed_batch"] > rows[1]["computed_batch"] > 3
    assert all(r["tokens_per_second"] == pytest.approx(3e3 / r["milliseconds"]) for r in rows)
    shown = kvcompress("bench", *tiny, "--decode", "--decode-batch", "1")
    assert shown.code == 0 and "tokens/s" in shown.stdout and "preallocated" in shown.stdout


def test_decode_says_what_does_not_fit(fails):
    assert "--memory" in fails("bench", "--shape", "tiny", "--device", "cpu", "--decode", "--memory", "100KB")
    assert "--decode-batch" in fails("bench", "--decode", "--decode-batch", "0")


def test_bad_requests(fails):
    assert "llama-3-8b" in fails("bench", "--shape", "nothing")
    assert "--batch" in fails("bench", "--batch", "1,two")
    assert "--context" in fails("bench", "--context", "0")
    assert "32 tokens" in fails("bench", "--context", "16")
    assert "power of two" in fails("bench", "--shape", "tiny", "--turn", "100", "--device", "cpu")
    assert "--device other" in fails("bench", "--shape", "tiny", "--device", "other")
    assert "no size" in fails("bench", "--memory", "much")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["OUT", "--keep", "0.5"], "--keep does nothing with OUT"),
        (["OUT", "--turn", "128"], "--turn does nothing with OUT"),
        (["--engine", "vllm", "--ranks-only"], "--ranks-only does nothing with --engine"),
        (["--engine", "vllm", "--memory", "80GB"], "--memory does nothing with --engine"),
        (["--limit", "9"], "--limit does nothing without --engine"),
        (["--decode-batch", "9"], "--decode-batch does nothing without --decode"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(fails, arguments, named):
    assert named in fails("bench", *arguments)


@pytest.mark.parametrize("keep", [0.0625, 0.125, 0.25, 0.5])
def test_typical_counts_spend_the_budget(keep):
    width = SHAPES["llama-3-8b"].width
    counts = typical_counts(width, keep)
    spent = sum(bits * n for bits, n in counts.items())
    assert 0 <= 16 * width * keep - spent < 16 and sum(counts.values()) <= width


@pytest.mark.parametrize("keep", [0.0625, 0.125, 0.25, 0.5])
@pytest.mark.parametrize("name", ["llama-3-8b", "llama-2-7b", "smollm2-135m", "tiny"])
@pytest.mark.parametrize("ranks_only", [False, True])
def test_typical_counts_of_turns_are_quads_of_every_group(name, keep, ranks_only):
    shape = SHAPES[name]
    assert components_at_a_time(shape, 64) == 1
    at_a_time = components_at_a_time(shape, 256)
    counts = typical_counts(shape.width, keep, ranks_only=ranks_only, at_a_time=at_a_time)
    spent = sum(bits * n for bits, n in counts.items())
    assert 0.94 * 16 * shape.width * keep - 16 * at_a_time < spent <= 16 * shape.width * keep
    for part in ("key", "value"):
        maps = random_maps(shape, part, counts, turn=256)
        of_class = torch.stack([maps.bits.int(), maps.block])
        sizes = of_class.unique(dim=1, return_counts=True)[1]
        assert len(sizes) == len(counts) * len(maps.blocks) and (sizes % 4 == 0).all()
        assert is_tileable(maps.bits, maps.block)


def test_counts_of_an_output_are_dealt_out_in_quads():
    maps = random_maps(SHAPES["llama-3-8b"], "key", {8: 36, 4: 284, 2: 232, 1: 160}, turn=128)
    assert is_tileable(maps.bits, maps.block)


def test_pages_need_the_kernels_that_read_them(kvcompress):
    outcome = kvcompress("bench", *SMALL, "--pages")
    assert outcome.code != 0 and "--pages times kernels of a GPU" in outcome.stderr


def test_the_table_of_pages(kvcompress, monkeypatch):
    pages = PagedTiming(0.125, 32768, 8, 68.6, 67.6, 35.0, 0.0)
    chunk = ChunkTiming(0.125, 32768, 2048, 4000.0, 3300.0, 500.0)
    monkeypatch.setattr("kvcompress.bench.run._time_pages", lambda *sizes: ([pages], [chunk]))
    outcome = kvcompress("bench", *SMALL, "--pages")
    assert outcome.code == 0
    words = outcome.stdout.split()
    assert {"68.6", "67.6", "4.00", "3.30", "0.50"} <= set(words)
