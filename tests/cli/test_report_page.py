"""`kvcompress report --html`, read by a person's browser: what it shows is what report.json says."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from kvcompress.evaluations import record_evaluation
from tests.browser import browser_page, chromium, needs_charts

needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium here (Debian: apt-get install chromium)")
pytestmark = needs_charts
NAMES = {"key": "keys", "value": "values"}


@pytest.fixture(scope="module")
def output(compressed, tmp_path_factory):
    """A coded output with two recorded evaluations, and sites of several bits, as report.json."""
    directory = shutil.copytree(compressed(), tmp_path_factory.mktemp("page") / "output")
    (directory / "evaluations.json").unlink(missing_ok=True)  # of tests that measured the shared output before
    for text, ratio in (("a <b>.txt", 1.0421), ("c.txt", 0.9993)):
        perplexity = {"original": 20.125, "compressed": 20.125 * ratio, "ratio": ratio}
        protocol = {"text": text, "text_sha256": "ab" * 32, "seq_len": 64, "windows": 3, "sinks": 2, "recent": 8}
        figures = {"perplexity": perplexity, "kl_nats": 0.04 * ratio, "top1_agreement": 0.9567, "keep": 0.5}
        record_evaluation(directory, "perplexity", figures | {"protocol": protocol | {"dtype": "float32"}})
    record_evaluation(directory, "tasks", {"piqa": {"original": 0.7}, "protocol": {"shots": 0}})
    report = json.loads((directory / "report.json").read_text())
    site = report["layers"][2]["value"]
    site |= {"bits_histogram": {"8": 2, "4": 3, "2": 5, "1": 0}, "rank": 10, "bits_per_token": 38}
    (directory / "report.json").write_text(json.dumps(report))
    return directory


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def page_file(output):
    from kvcompress.report.stored import read_report
    from kvcompress_cli.report import write_page

    write_page(output, read_report(output), output / "report.html")
    return output / "report.html"


@pytest.fixture(scope="module")
def browser():
    with browser_page() as page:
        yield page


@pytest.fixture
def page(browser, page_file):
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page_file)
    return browser


def looked_up(document, path):
    for name in path.split("."):
        document = document[int(name)] if isinstance(document, list) else document[name]
    return document


def as_number(text):
    """Return (the number that a reader reads, half a unit of its last digit)."""
    text = text.replace(",", "")
    scale = {"%": 0.01, "k": 1024, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    digits, unit = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?) ?([A-Za-z%]*)", text).groups()
    mantissa, _, exponent = digits.partition("e")
    half = 0.5 * 10 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    factor = scale.get(unit, 1)
    # a size or a percentage shows a fixed number of digits without trailing zeros
    return float(digits) * factor, half * factor if unit in ("", "%") else 6e-4 * float(digits) * factor


@needs_browser
def test_every_figure_is_the_reports(page, report, output):
    evaluations = json.loads((output / "evaluations.json").read_text())["evaluations"]
    shown = page.evaluate("[...document.querySelectorAll('data')].map(d => [d.dataset.path, d.value, d.textContent])")
    for path, value, text in shown:
        true = looked_up({"report": report, "evaluations": evaluations}, path)
        assert value == str(true), path
        read, tolerance = as_number(text)
        assert abs(read - true) <= tolerance * 1.001 + 1e-12, (path, text, true)
    paths = {path for path, _, _ in shown}
    for i in range(len(report["layers"])):
        for part in NAMES:
            for name in ("rank", "width", "bits_per_token", "predicted_loss"):
                assert f"report.layers.{i}.{part}.{name}" in paths
    for name in ("original", "compressed"):
        assert {f"report.bytes_per_token.{name}", *(f"report.cache_bytes.{i}.{name}" for i in range(4))} <= paths
    assert {"report.keep", "report.predicted_loss_nats", "report.maps.bytes", "evaluations.0.kl_nats"} <= paths
    assert "evaluations.1.perplexity.ratio" in paths
    cells = page.evaluate("[...document.querySelectorAll('td')].map(cell => cell.textContent)")
    assert cells[-2:] == ["piqa.original", "0.7"]


@needs_browser
def test_the_page_holds_the_report(page, report, output):
    document = page.evaluate("JSON.parse(document.getElementById('document').textContent)")
    assert document["evaluations"] == json.loads((output / "evaluations.json").read_text())["evaluations"]
    for private in (report["options"], report["calibration"]):  # where texts lay on a disk is nobody's business
        for name in ("calibration", "sources"):
            if name in private:
                private[name] = [Path(text).name for text in private[name]]
    assert document["report"] == report


@needs_browser
def test_no_complaints_and_nothing_fetched(page, page_file):
    assert page.complaints == []
    assert page.requests == [page_file.as_uri()]


@needs_browser
def test_the_heat_map_has_the_bits(page, report):
    cells = page.evaluate(
        "[...document.querySelectorAll('#chart-bits .mark-rect path')].map(p => [p.ariaLabel, p.getAttribute('fill')])"
    )
    steps = page.evaluate("JSON.parse(document.getElementById('chart-bits').dataset.steps)")
    legend = page.evaluate("[...document.querySelectorAll('.ramp b')].map(step => Number(step.textContent))")
    assert legend == [0, *steps]
    expected = {}
    for row in report["layers"]:
        for part, name in NAMES.items():
            site = row[part]
            said = f"layer {row['layer']} {name}: {site['bits_per_token']} bits a token for {site['width']} numbers"
            expected[said] = f"var(--r{sum(site['bits_per_token'] / site['width'] >= s for s in steps)})"
    assert dict(cells) == expected and len(cells) == len(expected)


@needs_browser
def test_the_bars_are_as_high_as_the_losses(page, report):
    bars = page.evaluate(
        "[...document.querySelectorAll('#chart-loss .mark-rect path')].map(p => [p.ariaLabel, p.getBBox().height])"
    )
    losses = {f"layer {row['layer']} {NAMES[p]}": row[p]["predicted_loss"] for row in report["layers"] for p in NAMES}
    assert len(bars) == len(losses)
    heights = {}
    for label, height in bars:
        site, _, loss = label.partition(": predicted loss ")
        assert float(loss) == losses[site]
        heights[site] = height
    scale = sum(heights.values()) / sum(losses.values())
    assert all(heights[site] == pytest.approx(scale * losses[site], abs=0.5) for site in losses)


@needs_browser
def test_hovering_a_spectrum_tells_the_energies(page, report):
    page.evaluate("document.getElementById('chart-key-spectra').scrollIntoView()")
    box = page.evaluate(
        "(r => [r.x + 0.4 * r.width, r.y + 0.5 * r.height])"
        "(document.querySelector('#chart-key-spectra svg').getBoundingClientRect())"
    )
    page.hover(*box)
    page.wait_for("document.querySelector('#vg-tooltip-element.visible') !== null")
    rows = page.evaluate("document.getElementById('vg-tooltip-element').innerText").strip().split("\n")
    told = dict(row.split("\t") for row in rows)
    i = int(told.pop("component")) - 1
    assert list(told) == ["layer 0", "layer 2", "layer 3"]
    for name, text in told.items():
        layer = int(name.split()[1])
        assert float(text) == report["energies"][f"layers.{layer}.key"][i]


@needs_browser
def test_a_click_on_the_heat_map_shows_that_layer(page):
    names = "[...document.querySelectorAll('#chosen button')].map(b => b.textContent.slice(0, -2))"
    assert page.evaluate(names) == ["layer 0", "layer 2", "layer 3"]
    page.evaluate("document.getElementById('chart-bits').scrollIntoView()")
    cell = "document.querySelector('#chart-bits [aria-label^=\"layer 1 keys\"]').getBoundingClientRect()"
    page.click(*page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({cell})"))
    assert page.evaluate(names) == ["layer 0", "layer 2", "layer 3", "layer 1"]
    page.evaluate("document.querySelector('#chosen button').click()")
    assert page.evaluate(names) == ["layer 2", "layer 3", "layer 1"]
    assert page.complaints == []


@needs_browser
def test_measured_points_stand_where_they_were_measured(page, report, output):
    marks = page.evaluate(
        "[...document.querySelectorAll('#chart-measured .role-mark [aria-label]')]"
        ".map(p => [p.ariaLabel, (r => r.x + r.width / 2)(p.getBoundingClientRect())])"
    )
    expected = {f"predicted loss {report['predicted_loss_nats']}": report["predicted_loss_nats"]}
    records = json.loads((output / "evaluations.json").read_text())["evaluations"][:2]
    for i, record in enumerate(records):
        ratio, text = record["perplexity"]["ratio"], record["protocol"]["text"]
        expected[f"{i + 1}  {text}: KL to the original {record['kl_nats']}"] = record["kl_nats"]
        expected[f"{i + 1}  {text}: rise of the loss (log of the ratio) "] = math.log(ratio)
    found = {}
    for label, x in marks:
        name = label if label in expected else re.sub(r"\S+$", "", label)
        assert float(label.split()[-1]) == pytest.approx(expected[name], rel=1e-9)
        found[expected[name]] = x
    assert len(marks) == len(expected) == 5
    low, high = min(found), max(found)
    per_nat = (found[high] - found[low]) / (high - low)
    assert all(x == pytest.approx(found[low] + per_nat * (nats - low), abs=1.0) for nats, x in found.items())


def luminance(colour):
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(page, selector):
    """Return the contrast ratio of WCAG between an element's text (in SVG: its fill) and the page."""
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    style = f"getComputedStyle(document.querySelector('{selector}'))"
    text = luminance(page.evaluate(f"'{selector}'.includes('text') ? {style}.fill : {style}.color"))
    return (max(ground, text) + 0.05) / (min(ground, text) + 0.05)


@needs_browser
@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_both_colour_schemes_are_readable(page, page_file, scheme, dark):
    page.open(page_file, scheme=scheme)
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2) == dark
    for selector in ("p", ".note", "figcaption", "#chart-bits text", "#chart-key-spectra text", "summary", "th"):
        assert contrast(page, selector) >= 4.5, selector
    page.evaluate("document.getElementById('theme').click()")  # auto -> light
    assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.8
    page.evaluate("document.getElementById('theme').click()")
    assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2


@needs_browser
@pytest.mark.parametrize("width", [1280, 640, 390, 320])
def test_it_fits_the_screen(page, page_file, width, report):
    page.open(page_file, width=width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    charts = page.evaluate(
        "[...document.querySelectorAll('.chart svg')].map(s => (r => [r.left, r.right])(s.getBoundingClientRect()))"
    )
    assert len(charts) == 5 and all(0 <= left < right <= width for left, right in charts)
    first, last = page.evaluate(
        "['layer 0 keys', 'layer 3 keys'].map(l => document.querySelector(`#chart-bits [aria-label^='${l}']`)"
        ".getBoundingClientRect()).map(r => [Math.round(r.x), Math.round(r.y)])"
    )
    across = last[0] > first[0] and last[1] == first[1]
    down = last[1] > first[1] and last[0] == first[0]
    assert (across, down) == ((True, False) if width > 640 else (False, True))
    assert page.complaints == []


@needs_browser
def test_it_prints(page):
    page.evaluate("addEventListener('afterprint', () => { window.printed = 'yes'; })")
    page.evaluate("addEventListener('beforeprint', () => { window.open_ = document.querySelector('details').open; })")
    assert page.send("Page.printToPDF")["data"].startswith("JVBERi")  # %PDF
    page.wait_for("window.printed === 'yes'")
    assert page.evaluate("window.open_") is True  # the table of layers is on paper
    assert page.evaluate("document.querySelector('details').open") is False


@needs_browser
def test_hostile_names_are_only_text(browser, output, tmp_path):
    from kvcompress_cli.report import write_page

    report = json.loads((output / "report.json").read_text())
    evil = '</script><script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
    report |= {"model": evil, "architecture": evil, "dtype": evil}
    report["options"]["policy"] = evil
    write_page(output, report, tmp_path / "page.html")
    browser.complaints.clear()
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("document.querySelector('h1').textContent") == evil
    assert browser.evaluate("document.title").startswith("</script>")
    assert browser.evaluate("document.querySelectorAll('script').length") == 3
    assert browser.complaints == []


@needs_browser
def test_every_form_has_a_page(browser, kvcompress, any_form, tmp_path):
    outcome = kvcompress("report", any_form, "--html", tmp_path / "page.html")
    assert outcome == (0, f"wrote {tmp_path / 'page.html'}\n", "")
    browser.complaints.clear()
    browser.open(tmp_path / "page.html")
    assert browser.complaints == []
    options = json.loads((any_form / "report.json").read_text())["options"]
    python = browser.evaluate(
        "document.querySelector('pre code:last-of-type') && [...document.querySelectorAll('pre')]"
        ".map(p => p.textContent).find(t => t.startsWith('import'))"
    )
    compile(python, "page", "exec")
    assert ("kvcompress.attach" in python) == options["maps_only"]


def test_the_page_does_without_network_and_is_not_heavy(page_file):
    text = page_file.read_text()
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert len(text.encode()) < 1.2e6


def test_json_and_page_together(kvcompress, compressed, tmp_path):
    outcome = kvcompress("report", compressed(), "--html", tmp_path / "page.html", "--json")
    assert json.loads(outcome.stdout)["form"] == "coded"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_failures_are_one_line_and_leave_nothing(fails, compressed, tmp_path, monkeypatch):
    assert "is a directory" in fails("report", compressed(), "--html", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails("report", compressed(), "--html", tmp_path / "file" / "page.html")
    output = shutil.copytree(compressed(), tmp_path / "copy")
    report = json.loads((output / "report.json").read_text())
    del report["cache_bytes"]
    (output / "report.json").write_text(json.dumps(report))
    assert "damaged" in fails("report", output, "--html", tmp_path / "page.html")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert "pip install 'kvcompress[html]'" in fails("report", compressed(), "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
