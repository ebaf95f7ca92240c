"""`kvcompress report`, and the bars and sizes that the tables are made of."""

from __future__ import annotations

import json
import shutil

import pytest

from kvcompress_cli import terminal
from tests.cli.test_app import run_process


def test_json_is_the_file(kvcompress, any_form):
    document = json.loads(kvcompress("report", any_form, "--json").stdout)
    assert document == json.loads((any_form / "report.json").read_text())


def test_the_table_has_every_layer_and_the_totals(kvcompress, compressed):
    output = compressed(keep=0.5)
    document = json.loads((output / "report.json").read_text())
    lines = kvcompress("report", output).stdout.splitlines()
    for row in document["layers"]:
        line = next(line for line in lines if line.split()[:1] == [str(row["layer"])])
        assert f"{row['key']['rank']}/32" in line and f"{row['value']['rank']}/32" in line
        assert f"{row['key']['predicted_loss']:.1e}" in line
        assert set("▏▎▍▌▋▊▉█") & set(line)
    text = "\n".join(lines)
    assert "0.5000 (asked for 0.5)" in text
    assert "cache at 128k" in text and "with 2 sinks and 8 recent tokens kept exact" in text
    assert max(map(len, lines)) <= 80


def test_without_fisher_the_loss_is_called_relative(kvcompress, compressed):
    text = kvcompress("report", compressed(metric="weights", calibration=())).stdout
    assert "loss, relative" in text and "not in nats" in text


def test_it_imports_nothing_heavy(compressed):
    process = run_process("report", compressed())
    assert process.returncode == 0
    assert process.stderr == "imported: []\n"


def test_no_or_a_damaged_report_is_one_line(fails, compressed, tmp_path):
    assert "is not an output of kvcompress compress" in fails("report", tmp_path)
    assert "nowhere is no directory. Name one that kvcompress compress made" in fails("report", "nowhere")
    output = shutil.copytree(compressed(), tmp_path / "copy")
    (output / "report.json").write_text('{"layers": [{}]}')
    assert "is damaged" in fails("report", output)
    (output / "report.json").write_text("{")
    assert "is damaged" in fails("report", output)


@pytest.mark.parametrize(
    ("share", "expected"), [(0, "    "), (1, "████"), (0.5, "██  "), (0.5 + 1 / 32, "██▏ "), (7, "████"), (-1, "    ")]
)
def test_a_bar_fills_its_share(share, expected):
    assert terminal.bar(share, 4) == expected


def test_a_bar_can_do_without_unicode():
    assert terminal.bar(0.5, 4, ascii_only=True) == "##  "


@pytest.mark.parametrize(
    ("n_bytes", "expected"), [(0, "0 B"), (999, "999 B"), (23040, "23.04 kB"), (3.02e9, "3.02 GB"), (5e15, "5000 TB")]
)
def test_sizes_have_decimal_units(n_bytes, expected):
    assert terminal.size(n_bytes) == expected
