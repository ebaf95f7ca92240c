"""heal() on tiny models: what is trained is what runs, it gets better, and killed trainings go on where they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import kvcompress
from kvcompress.checkpoint.maps import MAPS_FILE
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError, CheckpointError, OptionError, UnsupportedModelError
from kvcompress.export.export import export
from kvcompress.heal.heal import heal
from kvcompress.heal.options import HealOptions
from kvcompress.heal.student import Student
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import PLAN_FILE, Plan
from kvcompress.planning import make_plan
from kvcompress.report.healing import read_healing
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.output import read_output
from tests.export_cases import WIDE
from tests.tiny_models import prose, random_ids

SEQ_LEN = 48
FEW = HealOptions(tokens=24 * 4 * SEQ_LEN, seq_len=SEQ_LEN, batch=4, held_out=4, evaluations=3, maps_rate=2e-2)
CODED = CompressOptions(keep=0.125, sinks=2, recent=4, tokens=2048, seq_len=64)
#: Where training has most to gain: fitted without data.
BLIND = CompressOptions(keep=0.0625, sinks=2, recent=4, metric="weights")
FOLDED = CompressOptions(
    keep=0.5, folded=True, key_basis="grouped", policy="uniform", sinks=0, recent=0, tokens=2048, seq_len=64
)
HEADS = replace(FOLDED, key_basis="head", value_basis="head")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two kinds of text."""
    directory = tmp_path_factory.mktemp("texts")
    kinds = {"prose.txt": prose(6000, seed=3), "numbers.txt": " ".join(str(n * n) for n in range(3000))}
    for name, text in kinds.items():
        (directory / name).write_text(text, encoding="utf-8")
    return tuple(str(directory / name) for name in kinds)


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """output(options, family): a compressed tiny checkpoint, made once. Never write to it."""
    made: dict[str, Path] = {}

    def make(options: CompressOptions, family: str = "llama-mha", **sizes: Any) -> Path:
        key = repr((options, family, sizes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("output") / "out"
            if options.metric != "weights":
                options = replace(options, calibration=(str(text_file),))
            compress(tiny_checkpoint(family, **sizes), made[key], options, device="cpu")
        return made[key]

    return make


def run(directory: Path, target: Path, options: HealOptions, texts: tuple[str, ...], **more: Any) -> Any:
    return heal(directory, target, replace(options, text=texts), device="cpu", **more)


def total(stage: dict[str, Any], when: str) -> float:
    return sum(float(text[when]["kl_nats"]) for text in stage["texts"].values())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-gqa", {}),
        ("llama-gqa", {"key_basis": "frequency"}),
        ("llama-gqa", {"turn": 32}),
        ("llama-gqa", {"ranks_only": True, "keep": 0.5}),
        ("llama-yarn", {}),
        ("mistral-sliding", {}),
        ("smollm3", {}),
        ("qwen3", {}),
        ("phi3-partial", {}),
    ],
)
def test_before_training_the_model_sees_what_the_run_time_sees(
    tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any, family: str, changes: dict[str, Any]
) -> None:
    options = replace(CODED, **changes)
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        plan, maps, _ = make_plan(checkpoint, tiny_moments(family), options)
    model, ids = attach_plan(tiny_model(family), plan, maps), random_ids(2, 70)
    with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=4):
        expected = model(ids, use_cache=False).logits
    kvcompress.detach(model)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    attach_plan(model, plan, maps)
    distillation = Student(model, model, plan, maps).distillation(FEW, ids)
    with torch.no_grad():
        seen = model(ids, use_cache=False).logits
        with distillation.switch.off():
            taught = model(ids, use_cache=False).logits
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(taught, exact, rtol=1e-4, atol=1e-4)
    assert float((seen - exact).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("losses", "n_asked"), [({}, 2), ({"kl_loss": 0.0}, 1), ({"kl_loss": 0.0, "text_loss": 0.0, "hidden_loss": 1.0}, 2)]
)
def test_the_original_is_asked_where_a_loss_needs_it(
    tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any, losses: dict[str, float], n_asked: int
) -> None:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        plan, maps, _ = make_plan(checkpoint, tiny_moments("llama-gqa"), CODED)
    model, ids, calls = attach_plan(tiny_model("llama-gqa"), plan, maps), random_ids(2, 40), []
    distillation = Student(model, model, plan, maps).distillation(replace(FEW, **losses), ids)
    model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    distillation.train()(input_ids=ids)["loss"].backward()
    assert len(calls) == n_asked
    gradients = [p.grad for p in distillation.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients) and any(bool(g.any()) for g in gradients if g is not None)
    distillation.eval()(input_ids=ids)
    assert len(calls) == n_asked + 2


def test_a_model_that_no_reader_knows_is_healed(
    tiny_checkpoint: Any, text_file: Path, texts: tuple[str, ...], tmp_path: Path
) -> None:
    """Gemma 3: which weights make its keys is not known, its layers' windows and RoPE differ, its keys are normed."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 16}
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, **heads, sliding_window=24, layer_types=kinds, initializer_range=0.3)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    for file in tiny_checkpoint("llama-gqa").glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "gemma")
    options = replace(CODED, calibration=(str(text_file),))
    compress(tmp_path / "gemma", tmp_path / "out", options, device="cpu")
    model, ids = kvcompress.load(tmp_path / "out", dtype=torch.float32), random_ids(2, 70)
    with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=4):
        expected = model(ids, use_cache=False).logits
    Student(model, model, *read_output(tmp_path / "out")).distillation(FEW, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    few = replace(FEW, tokens=FEW.tokens // 3, evaluations=1)
    assert set(run(tmp_path / "out", tmp_path / "healed", few, texts).stage["texts"]) == set(texts)


def test_queries_in_chunks_see_what_they_see_at_once(
    tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        plan, maps, _ = make_plan(checkpoint, tiny_moments("llama-gqa"), CODED)
    model, ids = attach_plan(tiny_model("llama-gqa"), plan, maps), random_ids(1, 70)
    Student(model, model, plan, maps).distillation(FEW, ids)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for length in (1, 7, 64):
            monkeypatch.setattr("kvcompress.heal.attention._QUERIES", length)
            model.model.layers[0].self_attn.__dict__["kvcompress_heal"][1]._biases.clear()
            torch.testing.assert_close(model(ids, use_cache=False).logits, whole, rtol=1e-4, atol=1e-4)


def test_trained_maps_are_an_ordinary_output_that_is_better(
    output: Any, texts: tuple[str, ...], tmp_path: Path
) -> None:
    directory = output(BLIND)
    seen: list[Any] = []
    result = run(directory, tmp_path / "healed", FEW, texts, progress=seen.append)
    assert result.kept and total(result.stage, "after") < 0.95 * total(result.stage, "before")
    assert all(t["after"]["kl_nats"] <= t["before"]["kl_nats"] for t in result.stage["texts"].values())
    measured = [p for p in seen if p.held_out]
    assert [p.tokens for p in measured] == [FEW.tokens // 3 * k for k in (1, 2, 3)]
    assert all(set(p.held_out) == set(texts) and p.tokens_per_second > 0 for p in measured)
    assert Plan.load(tmp_path / "healed") == Plan.load(directory)
    before, after = (load_file(d / MAPS_FILE) for d in (directory, tmp_path / "healed"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"mean", "encoder", "decoder", "step"}
    weights = [(d / "model.safetensors").read_bytes() for d in (directory, tmp_path / "healed")]
    assert weights[0] == weights[1]
    model = kvcompress.load(tmp_path / "healed", dtype=torch.float32)
    cache = model.kvcompress_attachment.new_cache()
    model.generate(random_ids(1, 80), past_key_values=cache, max_new_tokens=8)
    assert cache.nbytes() == model.kvcompress_attachment.plan.cache_bytes(87, exact_number_bytes=4)
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "## Training after compression" in card and f"{FEW.tokens:,} tokens" in card
    assert json.loads((tmp_path / "healed" / "report.json").read_text())["healing"] == [result.stage]
    assert not list(tmp_path.glob(".healed*"))


def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    output: Any, texts: tuple[str, ...], tmp_path: Path
) -> None:
    directory, options = output(BLIND), replace(FEW, evaluations=6)
    run(directory, tmp_path / "whole", options, texts)
    (tmp_path / ".resumed.training").mkdir()
    (tmp_path / ".resumed.training" / "training.json").write_text("")  # left by a full disk; this one begins anew

    def kill(progress: Any) -> None:
        if progress.tokens > options.tokens / 2 and progress.held_out:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(directory, tmp_path / "resumed", options, texts, progress=kill)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(OptionError, match="a training with other options"):
        run(directory, tmp_path / "resumed", replace(options, maps_rate=1e-3), texts, resume=True)
    killed_in = tmp_path / ".resumed.training" / "checkpoint-99999"  # while this one was written
    killed_in.mkdir()
    (killed_in / "trainer_state.json").write_text('{"best_metric": nu')
    steps: list[int] = []
    run(directory, tmp_path / "resumed", options, texts, resume=True, progress=lambda p: steps.append(p.tokens))
    assert min(steps) > options.tokens / 3
    whole, resumed = (load_file(tmp_path / name / MAPS_FILE) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_deterministic_training_leaves_torch_as_it_was(output: Any, texts: tuple[str, ...], tmp_path: Path) -> None:
    seen: list[bool] = []
    few = replace(FEW, tokens=4 * SEQ_LEN, deterministic=True)
    run(output(BLIND), tmp_path / "healed", few, texts, progress=lambda _: seen.append(_deterministic()))
    assert seen and all(seen) and not _deterministic()


def test_a_training_that_cannot_repeat_its_bits_is_refused(
    output: Any, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation\nand more")

    monkeypatch.setattr("kvcompress.heal.trainer.HealingTrainer.training_step", forward)
    few = replace(FEW, tokens=4 * SEQ_LEN, deterministic=True)
    with pytest.raises(OptionError, match=r"repeat its bits here \(cumsum_cuda_kernel .* implementation\)\. Leave out"):
        run(output(BLIND), tmp_path / "healed", few, texts)
    assert not _deterministic()


def _deterministic() -> bool:
    strictly = not torch.is_deterministic_algorithms_warn_only_enabled()
    return strictly and torch.are_deterministic_algorithms_enabled()


def test_what_got_no_better_is_written_as_it_was(output: Any, texts: tuple[str, ...], tmp_path: Path) -> None:
    directory = output(CODED)
    result = run(directory, tmp_path / "healed", replace(FEW, maps_rate=3.0, warmup=0.0), texts)
    assert not result.kept
    assert (tmp_path / "healed" / MAPS_FILE).read_bytes() == (directory / MAPS_FILE).read_bytes()
    assert all(t["after"] == t["before"] for t in result.stage["texts"].values())
    assert "nothing was changed" in (tmp_path / "healed" / "README.md").read_text()


@pytest.mark.parametrize("train", ["maps", "attention", "all"])
@pytest.mark.parametrize("plan", [FOLDED, HEADS], ids=["grouped", "head"])
def test_folded_outputs_are_trained_and_exported(
    output: Any, texts: tuple[str, ...], tmp_path: Path, train: str, plan: CompressOptions
) -> None:
    directory = output(plan, **(WIDE if plan is HEADS else {}))
    options = replace(FEW, train=train, learning_rate=2e-3)
    result = run(directory, tmp_path / "healed", options, texts)
    share = total(result.stage, "after") / total(result.stage, "before")
    assert result.kept and share < (0.97 if train == "maps" else 0.9)
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "healed"))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    in_attention = {n for n in before if "self_attn" in n or "norm" in n}
    assert changed == {"maps": set(), "attention": in_attention, "all": set(before)}[train]
    export(tmp_path / "healed", tmp_path / "stock", dtype="float32")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    healed, ids = kvcompress.load(tmp_path / "healed", dtype=torch.float32), random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, healed(ids).logits, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks for it
def test_compiled_layers_train_as_others_do(
    output: Any, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    compile_module = torch.nn.Module.compile

    def traced(module: torch.nn.Module, **settings: Any) -> None:  # what is traced runs as it is: no compiler's minutes
        compiled.append(module)
        compile_module(module, **settings, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    options = replace(FEW, train="all", tokens=6 * 4 * SEQ_LEN, learning_rate=2e-3)
    plain = run(output(FOLDED), tmp_path / "plain", options, texts)
    assert not compiled and plain.kept
    traced_run = run(output(FOLDED), tmp_path / "traced", replace(options, compile=True), texts)
    assert len(compiled) == 2 * len({site.site.layer for site in traced_run.plan.sites})
    assert total(traced_run.stage, "after") == pytest.approx(total(plain.stage, "after"), rel=1e-3)


def test_a_norm_of_head_outputs_is_trained_loaded_and_refused_by_export(
    output: Any, texts: tuple[str, ...], tmp_path: Path
) -> None:
    directory = output(HEADS)
    options = replace(FEW, tokens=4 * FEW.tokens, train="all", learning_rate=3e-3, head_norm=True)
    result = run(directory, tmp_path / "normed", options, texts)
    assert result.kept
    model = kvcompress.load(tmp_path / "normed", dtype=torch.float32)
    assert model.model.layers[0].self_attn.head_norm.weight.shape == (4, 8)
    with pytest.raises(UnsupportedModelError, match="norm of every head's output"):
        export(tmp_path / "normed", tmp_path / "stock")
    again = run(tmp_path / "normed", tmp_path / "again", options, texts)
    assert len(read_healing(tmp_path / "again")) == 2
    assert total(again.stage, "before") == pytest.approx(total(result.stage, "after"), rel=1e-3)


def test_norms_begin_where_they_change_least(tiny_model: Any) -> None:
    from kvcompress.heal.head_norm import fit_head_norms
    from kvcompress.runtime.head_norm import add_head_norm

    model, ids = tiny_model("llama-gqa"), random_ids(2, 40)
    with torch.no_grad():
        exact = model(ids).logits
    norms = [add_head_norm(layer.self_attn, n_heads=4, head_dim=8) for layer in model.model.layers]
    errors = []
    for scale in (None, 1.0, 1.5):
        if scale is None:
            for norm in norms:
                torch.nn.init.ones_(norm.weight)
        else:
            fit_head_norms(norms, model, ids)
            for norm in norms:
                norm.weight.data *= scale
        with torch.no_grad():
            errors.append(float((model(ids).logits - exact).square().mean()))
    assert errors[1] < errors[0] and errors[1] < errors[2]


def test_a_gpu_that_is_too_small_is_one_line(
    output: Any, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kvcompress.heal.distil.Distillation.forward", full)
    with pytest.raises(OptionError, match="Lower --device-batch"):
        run(output(BLIND), tmp_path / "healed", FEW, texts)
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize("plan", [BLIND, FOLDED], ids=["coded", "folded"])
def test_a_model_learns_from_text_that_it_samples_itself(
    output: Any, texts: tuple[str, ...], tmp_path: Path, plan: CompressOptions
) -> None:
    result = run(output(plan), tmp_path / "healed", FEW, (texts[0], "self"))
    assert set(result.stage["texts"]) == {texts[0], "self"}
    again = run(output(plan), tmp_path / "again", FEW, (texts[0], "self"))
    assert again.stage["text_sha256"] == result.stage["text_sha256"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"train": "all"}, "coded form"),
        ({"head_norm": True}, "norm of head outputs"),
        ({"compile": True}, "layers are compiled for folded outputs alone"),
        ({"seq_len": 17, "text": ("x.txt",)}, None),
    ],
)
def test_what_cannot_be_healed_is_refused(
    output: Any, texts: tuple[str, ...], tmp_path: Path, changes: dict[str, Any], error: str | None
) -> None:
    directory = output(replace(CODED, recent=16))
    with pytest.raises(OptionError, match=error or "seq_len 17 is no longer than"):
        heal(directory, tmp_path / "healed", replace(replace(FEW, text=texts), **changes), device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_shared_out_is_refused(
    output: Any, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(OptionError, match="Launch it without: torchrun"):
        run(output(CODED), tmp_path / "healed", FEW, texts)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_and_a_lost_original_are_named(output: Any, texts: tuple[str, ...], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(CalibrationError, match=r"short\.txt has 0 windows of 48"):
        run(output(CODED), tmp_path / "healed", FEW, (str(short),))
    moved = tmp_path / "moved"
    shutil.copytree(output(FOLDED), moved)
    plan = json.loads((moved / PLAN_FILE).read_text())
    (moved / PLAN_FILE).write_text(json.dumps(plan | {"source": "/nowhere/model"}))
    with pytest.raises(CheckpointError, match="Name it with --base"):
        run(moved, tmp_path / "healed", FEW, texts)
