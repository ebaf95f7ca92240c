"""The app as a whole: help that is quick, failures of one line, and bugs that stay bugs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import kvcompress as library
from kvcompress import pipeline
from kvcompress_cli.app import app

COMMANDS = ("demo", "inspect", "compress", "report", "eval", "generate", "compare", "heal", "export", "push", "bench")
#: Runs the app as the installed script does, then says on stderr which heavy libraries were imported.
PROBE = """
import atexit, sys
from kvcompress_cli.app import main
heavy = ("torch", "transformers", "scipy")
atexit.register(lambda: print("imported:", [m for m in heavy if m in sys.modules], file=sys.stderr))
sys.argv = ["kvcompress", *sys.argv[1:]]
main()
"""
#: Shows the help of commands; says how many seconds of work each took, with the imports of all, and what was imported.
HELPING = """
import contextlib, io, json, sys, time
from kvcompress_cli.app import app
begun, found = time.process_time(), {}
for command in sys.argv[1:]:
    before = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        app([*command.split(), "--help"])
    heavy = [m for m in ("torch", "transformers", "scipy") if m in sys.modules]
    found[command] = begun + time.process_time() - before, heavy, "Usage" in shown.getvalue()
print(json.dumps(found))
"""


def run_process(*args, stdout=subprocess.PIPE):
    command = [sys.executable, "-c", PROBE, *map(str, args)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.fixture(scope="module")
def helped():
    process = subprocess.run([sys.executable, "-c", HELPING, "", *COMMANDS], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_imports_nothing_heavy(helped, command):
    seconds, heavy, is_help = helped[command]
    assert is_help and heavy == []
    assert seconds < 2.0  # half a second on a quick core, and one on that of some servers; of work: others may be busy


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_told_otherwise(monkeypatch, given, found):
    """Before torch is there: OpenMP reads it once. Threads that spin take processors from those they wait for."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    code = "import atexit, os; atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY']))\n" + PROBE
    process = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert process.stdout.split()[-1] == found and "imported: []" in process.stderr


def test_another_budget_needs_no_transformers(kvcompress, model, text, tmp_path):
    """Its import takes longer than all else that another budget does, where no model runs (as none above 4 GB does)."""
    given = ("--calibration", text, "--tokens", "256", "--seq-len", "64", "--recent", "8", "--maps-only", "--no-refit")
    assert kvcompress("compress", model, tmp_path / "first", *given).code == 0
    process = run_process("compress", model, tmp_path / "second", *given, "--keep", "0.5")
    assert process.returncode == 0 and (tmp_path / "second").is_dir()
    assert process.stderr.splitlines()[-1] == "imported: ['torch']"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(kvcompress, command):
    assert f"Example: kvcompress {command}" in kvcompress(command, "--help").stdout


def test_paragraphs_of_help_wrap_where_the_terminal_ends(kvcompress, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    lines = [line.strip() for line in kvcompress("heal", "--help").stdout.splitlines()]
    paragraph = next(line for line in lines if line.startswith("Distillation with"))
    assert paragraph.endswith("torchrun --no-python kvcompress heal.")


def test_help_shows_the_defaults_that_the_library_has(kvcompress, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = kvcompress("compress", "--help").stdout
    for default in ("(0.25)", "(latent)", "(loss)", "(65536)", "(2048)", "(fisher)", "(0)"):
        assert f"[default: {default}]" in text


def test_options_are_named_in_lower_case():
    """typer 0.27 takes a metavar that equals the parameter's name, such as TEXT, for the option's name."""
    group = typer.main.get_command(app)
    names = [name for command in group.commands.values() for p in command.params for name in p.opts]
    assert len(names) > 50
    assert [name for name in names if name.startswith("--") and name != name.lower()] == []


def test_version(kvcompress):
    assert kvcompress("--version") == (0, f"kvcompress {library.__version__}\n", "")


def test_no_command_shows_the_help(kvcompress):
    outcome = kvcompress()
    assert outcome.code == 0
    assert re.findall(r"^│ (\w+) ", outcome.stdout, re.MULTILINE) == list(
        COMMANDS
    )  # in the order in which they are used


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["inspect"], "MODEL"),
        (["inspect", "x", "--nonsense"], "--nonsense"),
        (["compress", "x", "y", "--keep", "much"], "--keep"),
        (["eval", "x", "--text", "y", "--recent", "-1"], "--recent"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(fails, args, words):
    line = fails(*args)
    assert words in line
    assert "--help" in line


def test_ctrl_c_is_one_line_and_exit_130(kvcompress, monkeypatch, tmp_path):
    def interrupted(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", interrupted)
    assert kvcompress("compress", "model", tmp_path / "out") == (130, "", "error: interrupted.\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 7.19 MiB "
            "is free. Process 7 has 9 GiB memory in use."
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["GPU", "CPU"],
)
def test_no_memory_is_one_line_and_exit_2(fails, monkeypatch, tmp_path, error):
    def full(*_args, **_settings):
        raise error

    monkeypatch.setattr(pipeline, "compress", full)
    line = fails("compress", "model", tmp_path / "out")
    assert "memory" in line and "--seq-len" in line and "Process 7" not in line


def test_a_package_made_for_another_torch_is_named(fails, kvcompress, monkeypatch, tmp_path):
    def broken(*_args, **_settings):  # as transformers says it: without the package's name
        try:
            exec("raise RuntimeError('operator x::nms does not exist')", {"__name__": f"{package}._meta"})
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'AttentionInterface'.") from error

    monkeypatch.setattr(pipeline, "compress", broken)
    package = "torchvision"
    assert "pip uninstall torchvision" in fails("compress", "model", tmp_path / "out")
    package = "ours"
    with pytest.raises(ModuleNotFoundError):
        kvcompress("compress", "model", tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_where_no_output_fits_it_is_one_line_and_exit_2(compressed, more):
    with open("/dev/full", "w") as full:
        process = run_process("report", compressed(), *more, stdout=full)
    assert process.returncode == 2
    assert process.stderr.splitlines()[:-1] == ["error: No space left on device."]


def test_arguments_that_are_not_utf8_are_one_line_and_exit_2(fails):
    for args in (["report", "\udcff"], ["generate", "out", "--prompt", "a\udcff"], ["\udcff"]):
        assert fails(*args).endswith("is not UTF-8. Rename the file, or give the text in UTF-8.\n")


def test_any_text_is_shown_where_there_is_ascii_alone():
    """A model's text, by rich; what typer prints is UTF-8 all the same."""
    code = "from kvcompress_cli import app, terminal; app.show_any_text(); terminal.stdout().print('文')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert shown == b"\\u6587\n"


@pytest.mark.parametrize("said", ["a bug", "shapes differ"])  # torch's errors, too, but for those of memory
def test_a_bug_is_no_user_error(kvcompress, monkeypatch, tmp_path, said):
    def broken(*_args, **_settings):
        raise RuntimeError(said)

    monkeypatch.setattr(pipeline, "compress", broken)
    with pytest.raises(RuntimeError, match=said):
        kvcompress("compress", "model", tmp_path / "out")


def test_a_process_prints_json_alone_and_nothing_on_stderr(model, text, tmp_path):
    args = ("--calibration", text, "--tokens", 128, "--seq-len", 64, "--json")
    process = run_process("compress", model, tmp_path / "out", *args)
    assert process.returncode == 0
    assert json.loads(process.stdout)["output"] == str(tmp_path / "out")
    assert process.stderr == "imported: ['torch', 'transformers', 'scipy']\n" or process.stderr == (
        "imported: ['torch', 'transformers']\n"
    )


def test_notes_of_the_library_are_one_line_each_and_only_once() -> None:
    code = (
        "import warnings, kvcompress_cli.app as app\n"
        "from kvcompress.errors import Note\n"
        "def noting():\n"
        "    for _ in range(3):\n"
        "        warnings.warn('read plainly.', Note, stacklevel=2)\n"
        "        warnings.warn('of a library', UserWarning)\n"
        "app.app = noting\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "note: read plainly.\n"
