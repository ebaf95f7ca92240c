"""Tasks through lm-eval: equal to lm-eval's own model class, by hand, and the errors. Skipped where it is missing."""

from __future__ import annotations

import json
import math
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import OptionError
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.engine_tasks import EngineAnswerer
from kvcompress.evaluate.scoring import encode_pair, score_pairs
from kvcompress.evaluate.sides import both_sides
from kvcompress.evaluate.task_files import load_task
from kvcompress.evaluate.tasks import evaluate_tasks, task_pairs
from kvcompress.options import CompressOptions
from kvcompress.planning import make_plan
from kvcompress.runtime.attach import attach_plan, detach
from tests.tiny_models import prose

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm-eval is not installed (pip install 'kvcompress[tasks]')",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # the warnings of lm-eval's own dependencies


@pytest.fixture
def attached(tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any) -> tuple[Any, Any]:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        options = CompressOptions(keep=0.5, sinks=2, recent=4, policy="uniform", ranks_only=True)
        plan, maps, _ = make_plan(checkpoint, tiny_moments("llama-gqa"), options)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    return attach_plan(tiny_model("llama-gqa"), plan, maps), tokenizer


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded tasks of every format: 12 documents each."""
    directory = tmp_path_factory.mktemp("tasks")
    rng = random.Random(3)

    def sentence(n: int) -> str:
        return prose(n, seed=rng.randrange(10**6)).strip() or "The river"

    choice = [{"query": sentence(20), "choices": [sentence(k + 2) for k in range(3)], "gold": i % 3} for i in range(12)]
    contexts = [{"contexts": [sentence(15), sentence(18)], "target": sentence(4), "gold": i % 2} for i in range(12)]
    cloze = [{"context": sentence(25), "target": sentence(2)} for _ in range(12)]
    for name, records in (("choice", choice), ("blank", contexts), ("last_word", cloze), ("proof", cloze)):
        lines = (json.dumps({"id": f"{name}-{i}"} | record) + "\n" for i, record in enumerate(records))
        (directory / f"{name}.jsonl").write_text("".join(lines))
    sidecar = {"choice.jsonl": {"format": "mc", "metric": "acc; acc_norm"}, "proof.jsonl": {"format": "cond"}}
    (directory / "TASKS.json").write_text(json.dumps(sidecar))
    return directory


@needs_lm_eval
def test_the_originals_numbers_are_lm_evals_own(attached: Any, task_directory: Path) -> None:
    """Every metric and every single log-likelihood, against the model class that lm-eval itself uses."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kvcompress.evaluate.lm_eval_model import FileTask, SideLM

    model, tokenizer = attached
    files = sorted(task_directory.glob("*.jsonl"))

    def run(lm: Any) -> Any:
        loaded = TaskManager(include_defaults=False).load([FileTask(load_task(file)) for file in files])
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=2)
            task.set_fewshot_seed(seed=1234)
        return lm_eval.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0)

    ours = run(SideLM(both_sides(model)[0], tokenizer, answers=Answers(), batch_size=5))
    coded = run(SideLM(both_sides(model)[1], tokenizer, answers=Answers(), batch_size=5))
    evaluation = evaluate_tasks(model, tokenizer, [str(task_directory)], n_fewshot=2)
    detach(model)
    theirs = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3))
    reported = {(t.task, m.metric): m.original for t in evaluation.tasks for m in t.metrics}
    changed = 0
    for name, samples in theirs["samples"].items():
        for key, value in theirs["results"][name].items():
            if "," in key and isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-4)
                assert reported[name, key.partition(",")[0]] == pytest.approx(value, rel=1e-4)
        for a, b, c in zip(ours["samples"][name], samples, coded["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            for (x,), (y,), (z,) in zip(a["resps"], b["resps"], c["resps"], strict=True):
                assert x[0] == pytest.approx(y[0], rel=1e-4) and x[1] == y[1]
                changed += abs(x[0] - z[0]) > 0.01
    assert changed > 60  # the compressed side really is another one


@needs_lm_eval
def test_figures_by_hand(attached: Any, task_directory: Path) -> None:
    model, tokenizer = attached
    result = evaluate_tasks(model, tokenizer, [str(task_directory / f"{n}.jsonl") for n in ("choice", "last_word")])
    assert [task.task for task in result.tasks] == ["choice", "last_word"]
    task = load_task(task_directory / "choice.jsonl")
    right: list[list[float]] = []
    for side in both_sides(model):
        answers = []
        for document in task.documents:
            scores = score_pairs(side, [encode_pair(tokenizer, *r) for r in task.requests(document)])
            values = [s.logprob for s in scores]
            answers.append(float(values.index(max(values)) == document["gold"]))
        right.append(answers)
    accuracy = next(m for m in result.tasks[0].metrics if m.metric == "acc")
    assert accuracy.headline and accuracy.paired
    assert (accuracy.original, accuracy.compressed) == pytest.approx([sum(r) / 12 for r in right])
    mean = sum(right[0]) / 12
    assert accuracy.original_stderr == pytest.approx(math.sqrt(mean * (1 - mean) / 11))
    assert accuracy.paired.difference == pytest.approx((sum(right[1]) - sum(right[0])) / 12)
    assert accuracy.paired.higher + accuracy.paired.lower == sum(a != b for a, b in zip(*right, strict=True))
    perplexity = next(m for m in result.tasks[1].metrics if m.metric == "perplexity")
    assert perplexity.paired is not None and perplexity.paired.test == "wilcoxon"
    assert perplexity.paired.difference == pytest.approx(math.log(perplexity.original / perplexity.compressed))
    assert result.average is not None
    headlines = [m for t in result.tasks for m in t.metrics if m.headline]
    assert result.average.original == pytest.approx(sum(m.original for m in headlines) / 2)
    assert 0.3 < result.tasks[0].compressed_share < 1
    assert result.protocol["recent"] == 4 and result.protocol["limit"] is None
    assert result.protocol["tasks"] == [task.task for task in result.tasks]  # other tasks are another record


@needs_lm_eval
def test_limit_window_and_few_shot(attached: Any, task_directory: Path) -> None:
    file = str(task_directory / "choice.jsonl")
    few = evaluate_tasks(*attached, [file], limit=5, n_fewshot=3).tasks[0]
    none = evaluate_tasks(*attached, [file], limit=5).tasks[0]
    assert (few.n_documents, few.n_fewshot, none.n_fewshot) == (5, 3, 0)
    assert few.compressed_share > none.compressed_share
    exact = evaluate_tasks(*attached, [file], limit=5, recent=10000)
    assert exact.tasks[0].compressed_share == 0
    assert all(m.original == m.compressed for m in exact.tasks[0].metrics)


@needs_lm_eval
def test_answers_collected_without_lm_eval_serve_it(
    attached: Any, task_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = attached
    file, files = tmp_path / "answers.jsonl", sorted(task_directory.glob("*.jsonl"))
    with Answers(file) as known:
        for side in both_sides(model):
            assert len(known.scores(side, task_pairs(tokenizer, files))) == 12 * (3 + 2 + 1 + 1)
    fresh = evaluate_tasks(model, tokenizer, [str(task_directory)])

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run")

    monkeypatch.setattr("kvcompress.evaluate.scoring._score_batch", never)
    assert evaluate_tasks(model, tokenizer, [str(task_directory)], answers=file) == fresh


@needs_lm_eval
def test_generating_and_rolling_requests(attached: Any) -> None:
    """What tasks of other kinds ask for: text with the real cache, and whole documents."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from kvcompress.evaluate.lm_eval_model import SideLM

    model, tokenizer = attached
    model.config.max_position_embeddings = 64
    context, document = prose(20, seed=5), prose(80, seed=6)
    ask = [Instance("generate_until", {}, (context, {"until": until, "max_gen_toks": 12}), 0) for until in ([], ["e"])]
    roll = [Instance("loglikelihood_rolling", {}, (document,), 0)]
    exact, coded = (SideLM(side, tokenizer, answers=Answers(), batch_size=2) for side in both_sides(model))
    written, rolled = exact.generate_until(ask), exact.loglikelihood_rolling(roll)
    ids = torch.tensor([tokenizer.encode(context)[-52:]])
    real = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert coded.generate_until(ask)[0] == tokenizer.decode(real[0, ids.shape[1] :], skip_special_tokens=True)
    assert written[1] == written[0].split("e", 1)[0]
    # in one batch, padded on the left, each text is the one that it is alone
    others = [
        Instance("generate_until", {}, (prose(n, seed=n), {"until": ["e"], "max_gen_toks": 12}), 0) for n in (3, 11)
    ]
    alone = SideLM(coded.side, tokenizer, answers=Answers(), batch_size=1)
    assert coded.generate_until([ask[1], *others]) == alone.generate_until([ask[1], *others])
    assert coded.loglikelihood_rolling(roll)[0] != pytest.approx(rolled[0], rel=1e-4)
    detach(model)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    assert stock.loglikelihood_rolling(roll)[0] == pytest.approx(rolled[0], rel=1e-4)
    assert stock.generate_until(ask[:1])[0] == written[0]


@needs_lm_eval
def test_an_engine_answers_for_the_compressed_side(attached: Any, task_directory: Path, monkeypatch: Any) -> None:
    """The engine itself is asked in tests/vllm; this one finds each token the likeliest, at -1."""
    from lm_eval.api.instance import Instance

    from kvcompress.evaluate.lm_eval_model import EngineLM

    asked: list[dict[str, Any]] = []

    def engine(settings: dict[str, Any]) -> dict[str, Any]:
        asked.append(settings)
        texts = [text for _, text in settings.get("given", [])]
        written = ["one two"] * len(settings.get("continued", {"prompts": []})["prompts"])
        return {
            "logprobs": [[-1.0] * len(x) for x in texts],
            "best": [[True] * len(x) for x in texts],
            "texts": written,
        }

    monkeypatch.setattr("kvcompress.evaluate.engine_tasks.run_engine", engine)
    model, tokenizer = attached
    file = str(task_directory / "last_word.jsonl")
    answerer = EngineAnswerer.beside(model, task_directory)
    found, without = (
        evaluate_tasks(model, tokenizer, [file], answerer=answerer),
        evaluate_tasks(model, tokenizer, [file]),
    )
    (task,), (plain,) = found.tasks, without.tasks
    figures = {m.metric: m for m in task.metrics}
    assert figures["acc"].compressed == 1.0
    lengths = [len(pair.continuation) for pair in task_pairs(tokenizer, [Path(file)])]
    assert figures["perplexity"].compressed == pytest.approx(math.exp(sum(lengths) / len(lengths)))
    assert {m.metric: m.original for m in plain.metrics} == {m.metric: m.original for m in task.metrics}
    assert len(asked) == 1 and found.protocol["engine"] == "vllm" and "engine" not in without.protocol
    lm = EngineLM(both_sides(model)[1], tokenizer, answerer=answerer, answers=Answers())
    options = {"until": ["two"], "max_gen_toks": 12}
    assert lm.generate_until([Instance("generate_until", {}, (x, options), 0) for x in ("a", "b")]) == ["one "] * 2
    assert asked[1]["continued"]["stop"] == ["two"] and len(asked) == 2
    with pytest.raises(OptionError, match="samples"):
        lm.generate_until([Instance("generate_until", {}, ("c", {"do_sample": True}), 0)])


@needs_lm_eval
def test_sampled_requests_are_not_one(attached: Any) -> None:
    from lm_eval.api.instance import Instance

    from kvcompress.evaluate.lm_eval_model import SideLM

    model, tokenizer = attached
    options = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 2.0}
    ask = [Instance("generate_until", {}, ("The river", options), 0) for _ in range(3)]
    state = torch.random.get_rng_state()
    lm = SideLM(both_sides(model)[1], tokenizer, answers=Answers(), batch_size=4)
    texts = lm.generate_until(ask)
    assert len(set(texts)) == 3
    assert lm.generate_until(ask) == texts
    assert torch.equal(torch.random.get_rng_state(), state)
    assert lm.share_compressed("any") is None


@needs_lm_eval
def test_errors_name_what_is_wrong(
    attached: Any, task_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcompress.evaluate.lm_eval_model import FileTask

    with monkeypatch.context() as patch, pytest.raises(OptionError, match="task choice needs running code"):
        patch.setattr(FileTask, "UNSAFE_CODE", True, raising=False)
        evaluate_tasks(*attached, [str(task_directory / "choice.jsonl")])
    with pytest.raises(OptionError, match="task no_such_task is unknown"):
        evaluate_tasks(*attached, ["no_such_task"])
    with pytest.raises(OptionError, match=r"gone\.jsonl does not exist"):
        evaluate_tasks(*attached, [str(tmp_path / "gone.jsonl")])
    with pytest.raises(OptionError, match="task choice has 12 documents, too few for 12 examples"):
        evaluate_tasks(*attached, [str(task_directory / "choice.jsonl")], n_fewshot=12)
    with pytest.raises(OptionError, match="no task is named"):
        evaluate_tasks(*attached, [])
    (tmp_path / "choice.jsonl").write_text((task_directory / "choice.jsonl").read_text())
    with pytest.raises(OptionError, match="two task files are called choice"):
        evaluate_tasks(*attached, [str(task_directory), str(tmp_path / "choice.jsonl")])


def test_without_lm_eval_the_error_says_what_to_install(
    attached: Any, task_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"pip install 'kvcompress\[tasks\]'"):
        evaluate_tasks(*attached, [str(task_directory)])


def test_a_plain_model_is_refused(tiny_model: Any, task_directory: Path) -> None:
    with pytest.raises(OptionError, match=r"no compressed cache|lm-eval"):
        evaluate_tasks(tiny_model("llama-gqa"), None, [str(task_directory)])
