"""A comparison: its figures are those of single evaluations, it goes on where it stopped, and its verdicts are true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import OptionError, OutputError
from kvcompress.evaluate import measured_cells
from kvcompress.evaluate.compare import COMPARISON_FILE, Request, compare
from kvcompress.evaluate.compare_document import joined
from kvcompress.evaluate.front import pareto, verdicts
from kvcompress.evaluate.measured_cells import CellBench
from kvcompress.evaluate.methods import cells_of
from kvcompress.evaluate.peer_run import evaluate_peer
from kvcompress.evaluate.peers import PEERS, find_peer
from kvcompress.evaluate.perplexity import Original, evaluate
from kvcompress.evaluate.windows import Windows
from kvcompress.kernels import site
from kvcompress.model.architectures import read_model_spec
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.report.comparison import comparison_table, headline, name_of
from kvcompress.runtime.load import load
from tests.tiny_models import build_tokenizer

MODEL = "llama-mha"
OPTIONS = CompressOptions(tokens=512, seq_len=256, sinks=2, recent=8)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import prose

    file = tmp_path_factory.mktemp("calibration") / "prose.txt"
    file.write_text(prose(1000, seed=5), encoding="utf-8")
    return file


@pytest.fixture
def request_of(text_file: Path, calibration: Path) -> Any:
    def make(*methods: str, keeps: tuple[float, ...] = (0.5, 0.25), **changes: Any) -> Request:
        from dataclasses import replace

        options = replace(OPTIONS, calibration=(str(calibration),), **changes)
        return Request(methods, keeps, str(text_file), options, seq_len=256, max_windows=2)

    return make


@pytest.fixture
def comparison(tiny_checkpoint: Any, request_of: Any, tmp_path: Path) -> dict[str, Any]:
    request = request_of("default", "palu", "mea-half", "kivi-2bit", "fp8", keeps=(0.75, 0.25))
    return compare(tiny_checkpoint(MODEL), tmp_path / "out", request)


def row(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in document["cells"] if name_of(c) == name)


def test_a_format_that_cannot_store_such_heads_is_a_row_that_says_so(
    tiny_checkpoint: Any, request_of: Any, tmp_path: Path
) -> None:
    document = compare(tiny_checkpoint(MODEL), tmp_path / "out", request_of("fp4", "turboquant-4bit_nc"))
    assert "head_dim" in row(document, "nvfp4")["impossible"] and document["complete"]
    assert row(document, "turboquant-4bit_nc")["ratio"] > 0


def test_figures_are_those_of_single_runs(
    comparison: dict[str, Any], tiny_checkpoint: Any, request_of: Any, text_file: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    options = replace(request_of("default").options, keep=0.25)
    compress(tiny_checkpoint(MODEL), tmp_path / "single", options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "single")
    single = evaluate(
        load(tmp_path / "single", dtype=torch.float32), tokenizer, str(text_file), seq_len=256, max_windows=2
    )
    cell = row(comparison, "default at 0.25")
    assert cell["ratio"] == pytest.approx(single.perplexity["ratio"], rel=1e-5)
    assert cell["kl_nats"] == pytest.approx(single.kl_nats, rel=1e-4)
    assert cell["original_perplexity"] == pytest.approx(single.perplexity["original"], rel=1e-6)
    assert comparison["original"]["perplexity"] == cell["original_perplexity"]


def test_peers_figures_are_those_of_single_runs(
    comparison: dict[str, Any], tiny_checkpoint: Any, tiny_model: Any, text_file: Path
) -> None:
    model, tokenizer = tiny_model(MODEL), AutoTokenizer.from_pretrained(tiny_checkpoint(MODEL))
    original = Original(model, Windows.of(tokenizer, str(text_file), 256, 2))
    spec = read_model_spec(model.config.to_dict())
    for name in ("kivi-2bit", "fp8"):
        single = evaluate_peer(model, original, find_peer(name), spec)
        cell = row(comparison, name)
        assert cell["ratio"] == pytest.approx(single.perplexity["ratio"], rel=1e-6)
        assert cell["bytes_per_token"] == PEERS[name].bytes_per_token(spec)


def test_measured_bytes_are_those_of_the_plan(comparison: dict[str, Any]) -> None:
    original = comparison["original"]["bytes_per_token"]
    assert original == 2 * 3 * 32 * 4  # keys and values, 3 layers, 32 numbers, float32
    for name, keep in (("default at 0.75", 0.75), ("default at 0.25", 0.25), ("mea-half at 0.75", 0.75)):
        positions = 4  # a token's position, once for all layers
        cell = row(comparison, name)
        assert cell["keep"] <= keep
        # the plan states whole bytes, a block of 32 tokens may hold half a byte for each
        assert cell["bytes_per_token"] == pytest.approx(cell["keep"] * original + positions, abs=1)
        assert cell["measured_bytes"]["tokens"] == 256
        assert cell["measured_bytes"]["bytes"] < 256 * original


def test_what_a_policy_cannot_do_is_said(comparison: dict[str, Any]) -> None:
    assert "leaves" in row(comparison, "mea-half at 0.25")["impossible"]
    table = comparison_table(comparison)
    assert "| mea-half at 0.25 |" in table
    assert f"\nNot possible: mea-half at 0.25: {row(comparison, 'mea-half at 0.25')['impossible']}\n" in table
    assert comparison["complete"] and "Not finished" not in comparison_table(comparison)


def test_the_model_is_calibrated_once_and_run_uncompressed_once(
    tiny_checkpoint: Any, request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[int] = []
    exact: list[int] = []
    states = Original.states

    def counted(self: Original, start: int, stop: int) -> torch.Tensor:
        exact.extend(index for index in range(start, stop) if index not in self._states)
        return states(self, start, stop)

    monkeypatch.setattr(Original, "states", counted)
    request = request_of("default", "palu", "kivi-4bit")
    progress: list[tuple[int, int]] = []

    def report(stage: str, done: int, total: int) -> None:
        if stage == "compare":
            progress.append((done, total))
        if stage == "calibrate" and done == total:
            calibrated.append(total)

    compare(tiny_checkpoint(MODEL), tmp_path, request, progress=report)
    assert exact == [0, 1]
    assert len(list(tmp_path.glob("kvcompress-moments-*.safetensors"))) == 1
    assert progress[-1] == (10, 10) and progress == sorted(progress)
    assert calibrated == [512]


def test_bytes_are_counted_without_kernels_which_each_cell_would_compile(
    tiny_checkpoint: Any, request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, given, argument = torch.device("cuda"), [], measured_cells.cache_argument
    monkeypatch.setattr(site, "_has_triton", lambda: True)

    def watched(*of: Any) -> Any:
        given.append(site.kernels_apply(gpu))
        return argument(*of)

    monkeypatch.setattr(measured_cells, "cache_argument", watched)
    compare(tiny_checkpoint(MODEL), tmp_path, request_of("default"))
    assert given and not any(given)
    assert site.kernels_apply(gpu)


def test_a_stopped_comparison_goes_on(
    tiny_checkpoint: Any, request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("fp8", "kivi")
    measured: list[str] = []
    measure = CellBench.measure

    def stops_at_the_third(self: Any, cell: Any, progress: Any) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell.method)
        return measure(self, cell, progress)

    monkeypatch.setattr(CellBench, "measure", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_checkpoint(MODEL), tmp_path, request)
    stopped = json.loads((tmp_path / COMPARISON_FILE).read_text())
    assert [c["method"] for c in stopped["cells"]] == measured == ["fp8", "fp8-unscaled"]
    assert not stopped["complete"] and "Not finished" in comparison_table(stopped)
    monkeypatch.undo()
    measured.clear()
    monkeypatch.setattr(
        CellBench, "measure", lambda self, cell, p: (measured.append(cell.method), measure(self, cell, p))[1]
    )
    document = compare(tiny_checkpoint(MODEL), tmp_path, request)
    assert measured == ["kivi-4bit", "kivi-2bit"]
    assert document["cells"][:2] == stopped["cells"]
    assert document["complete"] and document == json.loads((tmp_path / COMPARISON_FILE).read_text())


def test_other_settings_are_measured_anew(tiny_checkpoint: Any, request_of: Any, tmp_path: Path) -> None:
    first = compare(tiny_checkpoint(MODEL), tmp_path, request_of("default", keeps=(0.5,)))
    second = compare(tiny_checkpoint(MODEL), tmp_path, request_of("default", keeps=(0.5,), recent=64))
    assert first["cells"][0]["key"] != second["cells"][0]["key"]
    assert second["cells"][0]["kl_nats"] < first["cells"][0]["kl_nats"]


def test_a_damaged_file_is_no_reason_to_crash(tiny_checkpoint: Any, request_of: Any, tmp_path: Path) -> None:
    (tmp_path / COMPARISON_FILE).write_text("{}")
    with pytest.raises(OutputError, match="is damaged"):
        compare(tiny_checkpoint(MODEL), tmp_path, request_of("fp8"))


def test_what_cannot_be_compared_is_refused_at_once(tiny_checkpoint: Any, request_of: Any, tmp_path: Path) -> None:
    for methods, changes, message in (
        (("int3",), {}, "method 'int3' is unknown"),
        (("default",), {"recent": 100}, "hardly leave the recent window of 100"),
    ):
        with pytest.raises(OptionError, match=message):
            compare(tiny_checkpoint(MODEL), tmp_path / "out", request_of(*methods, **changes))
    assert not (tmp_path / "out").exists()


def test_comparisons_of_other_methods_on_the_same_windows_are_joined(
    tiny_checkpoint: Any, request_of: Any, tmp_path: Path
) -> None:
    methods = (("default", "kq-svd"), ("xkv", "kvtc-deflate"), ("fp8",))
    everything = request_of(*(m for some in methods for m in some), keeps=(0.5,))
    whole = compare(tiny_checkpoint(MODEL), tmp_path / "whole", everything)
    parts = [compare(tiny_checkpoint(MODEL), tmp_path / some[0], request_of(*some, keeps=(0.5,))) for some in methods]
    found = joined(parts)
    for document in (whole, found):
        for cell in document["cells"]:
            cell.pop("seconds", None)
    assert found == whole
    assert row(whole, "kvtc-deflate at 0.5")["bytes_per_token"] < 0.5 * whole["original"]["bytes_per_token"]
    assert row(whole, "xkv at 0.5")["kind"] == row(whole, "kq-svd at 0.5")["kind"] == "published"
    with pytest.raises(OptionError, match="share a cell"):
        joined([parts[0], parts[0]])
    with pytest.raises(OptionError, match="different protocol"):
        joined([parts[0], parts[1] | {"protocol": {}}])
    elsewhere = parts[1] | {"machine": parts[1]["machine"] | {"device": "a card", "cpu_count": 1}}
    devices = [parts[0]["machine"]["device"], "a card"]
    assert joined([parts[0], elsewhere, parts[2]])["machine"]["device"] == " and ".join(devices)
    other = elsewhere["original"] | {"perplexity": 1.001 * elsewhere["original"]["perplexity"]}
    with pytest.raises(OptionError, match="uncompressed perplexities differ"):
        joined([parts[0], elsewhere | {"original": other}])
    with pytest.raises(OptionError, match="different machine"):
        joined([parts[0], parts[1] | {"machine": parts[1]["machine"] | {"torch": "0"}}])


def test_layers_with_a_window_stay_the_models_own_in_every_method(request_of: Any, tmp_path: Path) -> None:
    """Gemma 3: one layer of two keeps a window; and a method that must know the weights is a row that says so."""
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64, "layer_types": kinds}
    config = transformers.Gemma3TextConfig(**sizes, **heads, max_position_embeddings=512)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    request = request_of("kq-svd", "xkv", "mea-half", "kivi-4bit", "nvfp4", "turboquant-4bit_nc", keeps=(0.5,))
    document = compare(tmp_path / "model", tmp_path / "out", request)
    own = 3 * 2 * 2 * 32 * 63  # bytes: layers, parts, bf16, numbers, tokens that transformers keeps of a window of 64
    assert document["original"]["bytes_per_token"] == 384
    assert document["original"]["cache_bytes"]["2048"] == 2048 * 384 + own
    assert "which weights make" in row(document, "mea-half at 0.5")["impossible"] and document["complete"]
    for name, left in (("kq-svd at 0.5", 0.5), ("kivi-4bit", 5 / 16), ("nvfp4", 4.5 / 16)):
        cell = row(document, name)
        assert cell["bytes_per_token"] == pytest.approx(left * 384, rel=0.04)
        assert cell["measured_bytes"]["bytes"] > own
    # 38 and 57 ranks of three layers of 32 numbers; the text's tokens share its vectors, 96 numbers of each rank
    n_old = (256 - OPTIONS.recent) // 32 * 32
    assert row(document, "xkv at 0.5")["bytes_per_token"] == pytest.approx(2 * 95 * (1 + 96 / n_old))
    # vLLM's exact layers are counted over all of the model's, so two of the three that grow are exact
    assert row(document, "turboquant-4bit_nc")["bytes_per_token"] == 2 * 128 + 2 + 16 + 16 + 4
    cache = find_peer("kivi-4bit").cache_bytes(read_model_spec_of(tmp_path / "model"), 256)
    assert row(document, "kivi-4bit")["measured_bytes"]["bytes"] == cache


def read_model_spec_of(directory: Path) -> Any:
    with open_checkpoint(directory) as checkpoint:
        return checkpoint.spec


def test_names_stand_for_cells(tmp_path: Path) -> None:
    names = [c.method for c in cells_of(("kivi", "fp8", "hqq-2bit"), (0.5, 0.25), OPTIONS)]
    assert names == ["kivi-4bit", "kivi-2bit", "fp8", "fp8-unscaled", "hqq-2bit"]
    assert len(cells_of(("hqq", "hqq-2bit"), (0.5,), OPTIONS)) == 4
    recipe = tmp_path / "mine.toml"
    recipe.write_text('policy = "uniform"\nrecent = 0\n')
    cells = cells_of((str(recipe),), (0.5, 0.25), OPTIONS)
    assert [(c.method, c.keep, c.options and c.options.policy) for c in cells] == [
        ("mine", 0.5, "uniform"),
        ("mine", 0.25, "uniform"),
    ]
    assert {c.options and c.options.recent for c in cells} == {8}  # the comparison's own
    recipe.write_text('folded = true\nkey_basis = "head"\nvalue_basis = "head"\n')
    with pytest.raises(OptionError, match="folds"):
        cells_of((str(recipe),), (0.5,), OPTIONS)


@pytest.mark.parametrize("method", ["palu", "mea-half"])
def test_published_methods_are_those_of_the_recipes(method: str) -> None:
    from kvcompress.options import load_recipe

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"{method}.toml")
    [cell] = cells_of((method,), (recipe.keep,), OPTIONS)
    assert cell.options is not None
    same = {"calibration", "tokens", "seq_len", "sinks", "recent", "seed"}  # the comparison's own
    ours = {k: v for k, v in cell.options.to_json().items() if k not in same}
    assert ours == {k: v for k, v in recipe.to_json().items() if k not in same}


def cell(method: str, size: float, ratio: float, *, keep: float | None = None, spread: float = 0.001) -> dict[str, Any]:
    logs = [ratio - 1 + spread * s for s in (-1, 0, 1)]
    kind = "ours" if method == "default" else "peer"
    return {
        "method": method,
        "kind": kind,
        "keep_asked": keep,
        "bytes_per_token": size,
        "ratio": ratio,
        "log_ratios": logs,
    }


OURS = [cell("default", 50, 1.001, keep=0.5), cell("default", 25, 1.01, keep=0.25)]


@pytest.mark.parametrize(
    ("size", "ratio", "verdict", "named"),
    [
        (30, 1.02, "behind", [0.25]),
        (60, 1.005, "behind", [0.5]),
        (50, 1.001, "behind", [0.5]),
        (30, 1.005, "between", []),
        (20, 1.02, "between", []),
        (20, 1.005, "ahead", [0.25]),
        (20, 1.0, "ahead", [0.25, 0.5]),
        (40, 1.0, "ahead", [0.5]),
    ],
)
def test_verdicts(size: float, ratio: float, verdict: str, named: list[float]) -> None:
    [found] = verdicts([*OURS, cell("peer", size, ratio)])
    assert found["verdict"] == verdict
    assert [o["keep_asked"] for o in found["ours"]] == named


def test_a_difference_within_the_noise_is_said() -> None:
    rows = [OURS[0], cell("peer", 20, 1.0005, spread=0.0)]
    rows[1]["log_ratios"] = [0.005, -0.005, 0.0015]
    [found] = verdicts(rows)
    assert found["verdict"] == "ahead" and found["clear"] is False
    rows[1]["log_ratios"] = [x - 0.0005 for x in OURS[0]["log_ratios"]]  # the same in every window
    rows[1]["log_ratios"][0] -= 1e-5
    [found] = verdicts(rows)
    assert found["clear"] is True
    document = {"verdicts": {"ratio": [found], "kl_nats": [found | {"verdict": "behind"}]}}
    assert "Not everywhere" in headline(document) and "peer against default at 0.5" in headline(document)
    assert headline(document).endswith("Nothing has both fewer bytes and a lower KL.")
    assert "KL" not in headline({"verdicts": {"ratio": [found], "kl_nats": [found]}})


def test_the_front_is_what_nothing_beats() -> None:
    rows = [*OURS, cell("a", 30, 1.02), cell("b", 20, 1.5), cell("c", 40, 1.0005), cell("d", 25, 1.02)]
    assert pareto(rows) == ["b", "default at 0.25", "c"]
