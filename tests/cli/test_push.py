"""`kvcompress push`, against a hub that is faked where huggingface_hub would speak to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import metadata_load
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import AutoModelForCausalLM

import kvcompress as library
from kvcompress.evaluations import record_evaluation
from tests.cli.conftest import FOLDED

REPOSITORY, BASE = "someone/small-kv", "org/tiny"
OWN = {"kv_maps.safetensors", "kv_plan.json", "report.json", "README.md"}
MEASURED = {
    "perplexity": {"original": 20.0, "compressed": 20.5, "ratio": 1.025},
    "kl_nats": 0.02,
    "top1_agreement": 0.95,
    "keep": 0.5,
    "protocol": {"text": "a.txt", "seq_len": 64, "windows": 2, "sinks": 2, "recent": 8, "dtype": "float32"},
}


class Hub:
    """What a hub holds and was asked: repositories as directories."""

    def __init__(self, root: Path) -> None:
        self.root, self.visibility, self.calls = root, {}, []

    def create_repo(self, api, repo_id, *, private=None, exist_ok=False, **_others):
        assert exist_ok
        self.calls.append("create_repo")
        self.visibility.setdefault(repo_id, bool(private))
        return f"https://hub.example/{repo_id}"

    def repo_info(self, api, repo_id, **_others):
        return SimpleNamespace(private=self.visibility[repo_id])

    def create_commit(self, api, repo_id, operations, *, commit_message, **_others):
        self.calls.append("create_commit")
        assert commit_message
        for operation in operations:
            target = self.root / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    def names(self):
        directory = self.root / REPOSITORY
        return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "repo_info", "create_commit"):
        method = getattr(hub, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda *a, _m=method, **k: _m(*a, **k))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return hub


@pytest.fixture
def output(compressed, tmp_path):
    directory = shutil.copytree(compressed(), tmp_path / "output")
    (directory / "evaluations.json").unlink(missing_ok=True)
    return directory


def test_maps_only_by_default_and_they_run(kvcompress, hub, output, model):
    record_evaluation(output, "perplexity", MEASURED)
    (output / ".hidden").write_text("x")
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    outcome = kvcompress("push", output, REPOSITORY, "--base", BASE, "--json")
    assert outcome.code == 0 and outcome.stderr == ""
    document = json.loads(outcome.stdout)
    assert document["url"] == f"https://hub.example/{REPOSITORY}" and document["private"] is False
    pushed = hub.root / REPOSITORY
    assert hub.names() == OWN | {"evaluations.json"} == set(document["files"])
    assert all((pushed / name).stat().st_size == n for name, n in document["files"].items())
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before  # the output itself is only read
    ids = torch.tensor([[5, 6, 7, 8] * 8])
    attached = library.attach(AutoModelForCausalLM.from_pretrained(model), pushed)
    assert torch.equal(attached(ids).logits, library.load(output)(ids).logits)


def test_what_is_sent_tells_the_base_and_no_local_paths(kvcompress, hub, output, model, text):
    assert kvcompress("push", output, REPOSITORY, "--base", BASE).code == 0
    pushed = hub.root / REPOSITORY
    for name in OWN - {"kv_maps.safetensors"}:
        content = (pushed / name).read_text()
        assert str(model) not in content and str(text.parent) not in content
    plan, report = (json.loads((pushed / name).read_text()) for name in ("kv_plan.json", "report.json"))
    assert plan["source"] == report["model"] == BASE
    assert plan["options"]["maps_only"] is report["options"]["maps_only"] is True
    assert plan["calibration"]["sources"] == [text.name]
    assert plan["source_fingerprint"] == json.loads((output / "kv_plan.json").read_text())["source_fingerprint"]


def test_the_card_is_for_the_repository(kvcompress, hub, output):
    record_evaluation(output, "perplexity", MEASURED)
    card = (output / "README.md").read_text()
    (output / "README.md").write_text(
        card.replace("library_name: transformers", "library_name: transformers\nlicense: mit")
    )
    assert kvcompress("push", output, REPOSITORY, "--base", BASE).code == 0
    pushed = hub.root / REPOSITORY / "README.md"
    metadata = metadata_load(pushed)
    assert metadata["base_model"] == BASE and metadata["base_model_relation"] == "adapter"
    assert metadata["license"] == "mit"
    text = pushed.read_text()
    assert f'snapshot_download("{REPOSITORY}")' in text and f'from_pretrained("{BASE}"' in text
    assert "**1.0250**" in text


def test_a_card_rewritten_by_hand_is_sent_as_it_is(kvcompress, hub, output):
    (output / "README.md").write_text("our own words")
    assert kvcompress("push", output, REPOSITORY, "--base", BASE).code == 0
    assert (hub.root / REPOSITORY / "README.md").read_text() == "our own words"


def test_everything_on_request(kvcompress, hub, output):
    outcome = kvcompress("push", output, REPOSITORY, "--all")
    assert outcome.code == 0
    assert hub.names() == {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert "model.safetensors" in outcome.stdout and "(public)" in outcome.stdout
    pushed = hub.root / REPOSITORY
    assert (pushed / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert json.loads((pushed / "kv_plan.json").read_text())["source"] == "tiny"
    assert library.load(pushed)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_private(kvcompress, fails, hub, output):
    assert "(private)" in kvcompress("push", output, REPOSITORY, "--base", BASE, "--private").stdout
    hub.visibility[REPOSITORY], hub.calls = False, []
    line = fails("push", output, REPOSITORY, "--base", BASE, "--private")
    assert "exists and is public, so nothing was sent" in line
    assert "create_commit" not in hub.calls


def test_without_a_token(fails, hub, output, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    line = fails("push", output, REPOSITORY, "--base", BASE)
    assert "no Hugging Face token" in line and "hf auth login" in line
    assert hub.calls == []


def test_what_cannot_be_sent_is_one_line(fails, hub, output, compressed, tmp_path):
    assert "Name that model's repository with --base ORG/NAME" in fails("push", output, REPOSITORY)
    assert "must be ORG/NAME, found 'small'" in fails("push", output, "small", "--base", BASE)
    assert "--base must be ORG/NAME" in fails("push", output, REPOSITORY, "--base", "/a/b")
    assert "with --all" in fails("push", compressed(**FOLDED), REPOSITORY, "--base", BASE)
    assert "is not an output of kvcompress compress" in fails("push", tmp_path, REPOSITORY)
    (output / "kv_maps.safetensors").unlink()
    assert "has no kv_maps.safetensors" in fails("push", output, REPOSITORY, "--base", BASE)
    assert hub.calls == []


def refusal():
    return HfHubHTTPError("403 Forbidden\nmore", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("error", [refusal(), OSError("no route to host"), HTTPError("no name server")])
def test_a_hub_that_refuses_is_one_line(fails, hub, output, monkeypatch, error):
    def refuse(*_args, **_settings):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", refuse)
    line = fails("push", output, REPOSITORY, "--base", BASE)
    assert f"the hub did not take {REPOSITORY}" in line and str(error).splitlines()[0] in line
