"""`kvcompress compare`: files, table, page, and a second call that measures nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.browser import browser_page, chromium, needs_charts

needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)")
METHODS = "default,palu,mea-half,kivi,fp8"


@pytest.fixture(scope="module")
def arguments(model, text):
    shape = ("--tokens", "512", "--seq-len", "192", "--max-windows", "2", "--recent", "8", "--sinks", "2")
    return ("compare", model, "--text", text, "--calibration", text, "--keep", "0.5,0.25", "--methods", METHODS, *shape)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The directory of a finished comparison. Never written to."""
    from kvcompress_cli.app import app

    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.raises(SystemExit):
        app([str(a) for a in (*arguments, "--out", out, "--json")])
    return out


@pytest.fixture(scope="module")
def document(finished):
    return json.loads((finished / "compare.json").read_text())


@needs_charts
def test_every_cell_is_in_every_file(finished, document):
    names = [f"{m} at {k}" for m in ("default", "palu", "mea-half") for k in ("0.5", "0.25")]
    names += ["kivi-4bit", "kivi-2bit", "fp8", "fp8-unscaled"]
    table, page = (finished / "compare.md").read_text(), (finished / "compare.html").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith(("| ", "|-"))][1:] == [
        "|---|---:|---:|---:|---:|---:|---|",
        *(f"| {name}" for name in names),
    ]
    assert all(f">{name}</td>" in page for name in names)
    assert document["complete"] and len(document["cells"]) == len(names)
    assert {p.name for p in finished.iterdir() if p.suffix != ".safetensors"} == {
        "compare.json",
        "compare.md",
        "compare.html",
        "pareto-light.svg",
        "pareto-dark.svg",
    }


def test_the_command_is_told(kvcompress, arguments, finished, document, model, text):
    """The command in the table, with the places of the files put back, asks for the same comparison."""
    line = (finished / "compare.md").read_text().splitlines()[-1]
    words = shlex.split(line)
    assert words[:3] == ["kvcompress", "compare", model.name]
    words = [str(text) if w == text.name else w for w in words[3:]]
    outcome = kvcompress("compare", model, *words, "--out", finished, "--json")
    assert json.loads(outcome.stdout)["cells"] == document["cells"]


def test_again_measures_nothing(kvcompress, arguments, finished, document, monkeypatch):
    from kvcompress.evaluate.measured_cells import CellBench

    monkeypatch.setattr(CellBench, "measure", None)  # calling it fails
    outcome = kvcompress(*arguments, "--out", finished, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout) == document


@needs_charts
def test_the_table_on_the_terminal(kvcompress, arguments, finished, document):
    outcome = kvcompress(*arguments, "--out", finished)
    assert outcome.code == 0
    for cell in document["cells"]:
        if "ratio" in cell:
            assert f"{cell['ratio']:.4f}" in outcome.stdout
    assert outcome.stdout.count("not possible") == sum("impossible" in c for c in document["cells"]) == 1
    assert "compare.html" in outcome.stdout


@needs_charts
def test_nothing_on_the_page_tells_where_files_lie(finished, model, text):
    for name in ("compare.md", "compare.html"):
        assert str(Path(model).parent) not in (finished / name).read_text()
        assert str(Path(text).parent) not in (finished / name).read_text()


@needs_browser
@needs_charts
def test_the_page_in_a_browser(finished, document):
    with browser_page() as page:
        page.open(finished / "compare.html")
        assert page.complaints == []
        assert [r for r in page.requests if not r.startswith("file:")] == []
        figures = page.evaluate("[...document.querySelectorAll('data')].map(d => [d.dataset.path, d.value])")
        assert len(figures) > 8 * len(document["cells"])
        for path, value in figures:
            found = {"comparison": document}
            for name in path.split("."):
                found = found[int(name)] if isinstance(found, list) else found[name]
            assert str(found) == value
        drawn = page.evaluate(
            "[...document.querySelectorAll('#chart-ratio [aria-roledescription=point]')].map(p => p.ariaLabel)"
        )
        measured = [c for c in document["cells"] if "ratio" in c]
        assert len(drawn) == len(measured)
        for cell in measured:
            assert any(f"ratio {cell['ratio']}," in said and said.startswith(cell["method"]) for said in drawn)
        for width in (390, 1280):
            page.open(finished / "compare.html", width=width, scheme="dark")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.complaints == []


@needs_charts
@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_figure_holds_every_cell_that_does_not_lie_on_another(finished, document, name):
    from xml.etree import ElementTree

    figure = ElementTree.parse(finished / f"pareto-{name}.svg")
    said = "".join(figure.getroot().itertext())
    measured = [c for c in document["cells"] if "ratio" in c and not c["method"].endswith(("-once", "-unscaled"))]
    assert len({c["method"] for c in measured}) > 1
    for cell in measured:
        assert (f"{cell['keep_asked']:g}" if cell["kind"] == "ours" else cell["method"]) in said


@needs_charts
def test_where_ours_is_beaten_the_page_says_so(document):
    """A peer that is moved ahead of one of our points is named at the top, in the list and in the table."""
    from kvcompress.evaluate.front import verdicts
    from kvcompress.report.comparison import comparison_table
    from kvcompress.report.comparison_page import comparison_page

    changed = json.loads(json.dumps(document))
    peer = next(c for c in changed["cells"] if c["method"] == "kivi-2bit")
    peer |= {"bytes_per_token": 1.0, "ratio": 0.5, "kl_nats": 0.0, "log_ratios": [-0.7, -0.71]}
    changed["verdicts"] = {figure: verdicts(changed["cells"], figure) for figure in ("ratio", "kl_nats")}
    page, table = comparison_page(changed), comparison_table(changed)
    said = "kivi-2bit against default at 0.25, default at 0.5"
    assert said in table.splitlines()[0]
    assert said in page[page.index('id="headline"') :][:400]
    for figure in ("ratio", "kl_nats"):
        part = page[page.index(f'id="ahead-{figure}"') :]
        assert "<li>kivi-2bit: AHEAD of default at 0.25, default at 0.5</li>" in part[: part.index("</div>")]


@needs_charts
def test_a_page_can_be_drawn_anew(kvcompress, fails, finished, tmp_path):
    (tmp_path / "compare.json").write_text((finished / "compare.json").read_text())
    assert kvcompress("compare", "--redraw", "--out", tmp_path).code == 0
    for name in ("compare.md", "compare.html", "pareto-light.svg", "pareto-dark.svg"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    assert "nothing was compared there" in fails("compare", "--redraw", "--out", tmp_path / "no")


def test_without_the_charting_library_there_is_a_table(kvcompress, finished, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    (tmp_path / "compare.json").write_text((finished / "compare.json").read_text())
    outcome = kvcompress("compare", "--redraw", "--out", tmp_path)
    assert outcome.code == 0 and "kvcompress[html]" in outcome.stderr
    assert (tmp_path / "compare.md").exists() and not (tmp_path / "compare.html").exists()


def test_failures_are_one_line(fails, model, text, tmp_path):
    common = ("compare", model, "--text", text, "--out", tmp_path / "out")
    assert "needs a MODEL and a --text" in fails("compare", model)
    assert "does not exist" in fails("compare", model, "--text", "missing.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "--keep 'half' is no list of numbers" in fails(*common, "--keep", "half")
    assert "keep must be above 0" in fails(*common, "--keep", "2")
    assert "method 'int3' is unknown" in fails(*common, "--methods", "int3")
    assert "hardly leave the recent window" in fails(*common, "--methods", "default", "--seq-len", "128")
    assert "in one dtype" in fails(*common, "--dtype", "auto")
    assert not (tmp_path / "out").exists()
