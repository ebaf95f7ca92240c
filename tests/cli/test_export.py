"""`kvcompress export`: what is printed, what is refused, and --verify in the engine that is always there."""

from __future__ import annotations

import json
import sys

import pytest

from kvcompress.errors import OptionError
from kvcompress.export import verify as verification
from kvcompress.export.engines import transformers_engine
from tests.cli.conftest import FOLDED

GROUPED = FOLDED | {"key_basis": "grouped", "value_basis": "latent", "recent": 0, "keep": 0.5}


def test_json_is_the_promised_object(kvcompress, compressed, tmp_path):
    outcome = kvcompress("export", compressed(**GROUPED), "-o", tmp_path / "out", "--json")
    assert outcome.code == 0 and outcome.stderr == ""
    document = json.loads(outcome.stdout)
    assert document["kv_heads_per_layer"] == [1] * 4 and document["head_dim"] == 16
    assert document["cache_bytes_per_token"] == {"original": 512, "exported": 256}
    assert document["pays_from_cached_tokens"] == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_verify_runs_stock_transformers(kvcompress, compressed, text, tmp_path):
    folded = compressed(**GROUPED)
    flags = ("--dtype", "float32", "--verify", "--text", text, "--json")
    outcome = kvcompress("export", folded, "-o", tmp_path / "out", *flags)
    assert outcome.code == 0, outcome.stderr
    check = json.loads(outcome.stdout)["verify"][0]
    assert check["engine"] == "transformers" and check["passed"] is True
    assert check["max_logit_difference"] < 1e-3 and check["same_tokens"] == check["n_generate"] == 64
    assert check["n_positions"] == 512
    assert check["bytes_per_token"] == check["claimed"] == 512  # 256 in bf16


def test_verify_finds_a_wrong_export(kvcompress, compressed, text, tmp_path, monkeypatch):
    """A query projection that was not widened by the decoders."""
    from kvcompress.export import weights

    monkeypatch.setattr(weights, "query_rows", lambda layer, positions, tensor: tensor)
    flags = ("--dtype", "float32", "--verify", "--text", text)
    outcome = kvcompress("export", compressed(**GROUPED), "-o", tmp_path / "out", *flags)
    assert outcome.code == 2
    assert "transformers" in outcome.stderr and "differs from the folded model: logits by" in outcome.stderr
    assert "FAILED" in outcome.stdout


def test_rounded_weights_are_no_failure(kvcompress, compressed, text, tmp_path):
    outcome = kvcompress("export", compressed(**GROUPED), "-o", tmp_path / "out", "--verify", "--text", text)
    assert outcome.code == 0 and "weights are rounded" in outcome.stdout
    assert "vllm serve" in outcome.stdout


def test_an_engine_that_breaks_is_named(kvcompress, compressed, text, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "find_engines", lambda target, pythons: {"llama_cpp": sys.executable})
    monkeypatch.setattr(verification, "_N_POSITIONS", 16)
    script = tmp_path / "engines" / "llama_cpp_engine.py"
    script.parent.mkdir()
    script.write_text("raise SystemExit('it cannot load this')")
    monkeypatch.setattr(verification, "__file__", str(tmp_path / "verify.py"))
    outcome = kvcompress("export", compressed(**GROUPED), "-o", tmp_path / "out", "--verify", "--text", text)
    assert outcome.code == 2
    assert "llama_cpp does not run the export: it cannot load this" in outcome.stderr


def test_engines_are_looked_for_in_other_environments(tmp_path):
    assert verification.find_engines("hf", [sys.executable])["transformers"] == sys.executable
    with pytest.raises(OptionError, match="cannot be run"):
        verification.find_engines("hf", ["/nowhere/python"])
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such luck >&2; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(OptionError, match="no working Python: no such luck"):
        verification.find_engines("hf", [str(broken)])


def test_the_engines_scripts_import_nothing_of_ours():
    import ast
    from pathlib import Path

    scripts = sorted(Path(transformers_engine.__file__).parent.glob("*_engine.py"))
    assert len(scripts) >= 2
    for script in scripts:
        tree = ast.parse(script.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert names and not any(name.startswith("kvcompress") for name in names)


def test_folded_means_groups_unless_told(kvcompress, model, text, tmp_path):
    flags = ("--tokens", "512", "--seq-len", "64", "--calibration", text, "--json")
    assert kvcompress("compress", model, tmp_path / "out", "--folded", *flags).code == 0
    options = json.loads((tmp_path / "out" / "kv_plan.json").read_text())["options"]
    assert (options["key_basis"], options["policy"], options["recent"]) == ("grouped", "uniform", 0)


def test_failures_are_one_line(fails, compressed, model, tmp_path):
    assert "Fold it first" in fails("export", model, "-o", tmp_path / "out")
    assert "coded form" in fails("export", compressed(), "-o", tmp_path / "out")
    assert "is not an output" in fails("export", tmp_path, "-o", tmp_path / "out")
    assert "target 'onnx' is unknown" in fails("export", compressed(**GROUPED), "--to", "onnx", "-o", tmp_path / "out")
    assert "--output" in fails("export", compressed(**GROUPED))
    for idle in (["--text", "book.txt"], ["--engine-python", "python3"]):
        told = fails("export", compressed(**GROUPED), "-o", tmp_path / "out", *idle)
        assert f"{idle[0]} does nothing without --verify" in told
    assert not (tmp_path / "out").exists()
