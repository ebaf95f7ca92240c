"""Every causal-LM type of the installed transformers, compressed and run: `python -m tests.models.survey [TYPE ...]`.

A small random model of each type is saved, compressed twice and attached. At full rank (every site through its codecs)
greedy decoding must give the tokens of the model's own cache: a left-padded batch, 40 tokens beyond the window. At keep
0.25 the storages must be what the plan claims, and `eval` must run. Without types all are tried; --jobs N: N at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import kvcompress
from kvcompress.errors import KVCompressError
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attachment_of
from kvcompress.site_plan import SitePlan
from tests.models.small import causal_types, small_model
from tests.tiny_models import PAD, build_tokenizer, prose

SINKS, RECENT = 4, 16
_PROMPT, _BEYOND = 24, 40
#: Seconds that one type may take.
LIMIT = 300


@dataclass
class Finding:
    """What was seen of one type. status: passes, refused (with the reason) or fails; no model: none can be built so."""

    model_type: str
    status: str
    reason: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    sites: str = ""
    rotation: str = ""
    reads: str = ""


class TooSlow(Exception):
    """A type took longer than LIMIT."""


def survey(model_type: str, directory: Path, **changes: Any) -> Finding:
    """Return how a type fares; nothing is raised but what ends the program."""
    finding = Finding(model_type, "no model")
    try:
        with limited(LIMIT):
            model = small_model(model_type, **changes)
            finding.status = "fails"
            check(model, directory, finding)
            finding.status = "passes"
    except KVCompressError as error:
        finding.status, finding.reason = "refused", str(error)
    except Exception as error:
        finding.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200] or '-'}"
    return finding


def check(model: Any, directory: Path, finding: Finding) -> None:
    """Raise AssertionError, or what went wrong, unless a model passes; its layers and sites are written down."""
    model.config.use_cache = True
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory / "model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory / "model")
    text = directory / "text.txt"
    text.write_text(prose(2500))
    options = {"calibration": (str(text),), "tokens": 384, "seq_len": 96, "sinks": SINKS, "recent": RECENT}
    with mock.patch.object(SitePlan, "exact", False):
        whole = CompressOptions(keep=1.0, ranks_only=True, policy="uniform", **options)
        plan = compress(directory / "model", directory / "whole", whole, device="cpu").plan
        n_new = (plan.window or RECENT) + _BEYOND
        own = generated(model, n_new)
        describe(finding, plan, kvcompress.attach(model, directory / "whole"))
        assert_same(own, generated(model, n_new))
    kvcompress.detach(model)
    plan = compress(
        directory / "model", directory / "quarter", CompressOptions(keep=0.25, **options), device="cpu"
    ).plan
    kvcompress.attach(model, directory / "quarter")
    check_bytes(model, plan)
    result = evaluate(model, tokenizer, str(text), seq_len=96, max_windows=2)
    ratio = result.perplexity["ratio"]
    assert 0.2 < ratio < 1e4, f"the ratio of perplexities is {ratio}"


def generated(model: Any, n_new: int) -> Any:
    """Return greedy tokens and logits of a left-padded batch, 40 tokens beyond the window."""
    ids = torch.randint(3, 300, (2, _PROMPT), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = PAD, 0
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_logits=True,
        )


def assert_same(own: Any, ours: Any) -> None:
    """The same tokens; where one differs, only because its logit was within rounding of the other's."""
    for step, (theirs, found) in enumerate(zip(own.logits, ours.logits, strict=True)):
        scale = float(theirs.std())
        error = float((theirs - found).abs().max()) / scale
        assert error < 2e-2, f"logits of token {step} differ by {error:.3g} of their standard deviation"
        if not torch.equal(theirs.argmax(-1), found.argmax(-1)):
            top = theirs.topk(2, -1).values
            gap = float((top[:, 0] - top[:, 1]).min()) / scale
            assert gap < 2e-2, f"token {step} is another, with a lead of {gap:.3g}"
            return  # a tie within rounding: what follows are other texts


def check_bytes(model: Any, plan: Plan) -> None:
    """A sequence's cache holds the bytes that the plan claims, measured from its storages."""
    ids = torch.randint(3, 300, (1, 100), generator=torch.Generator().manual_seed(3))
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        model(input_ids=ids[:, :90], use_cache=True, past_key_values=cache)
        for i in range(90, 100):
            model(input_ids=ids[:, i : i + 1], use_cache=True, past_key_values=cache)
    claimed, measured = plan.cache_bytes(100, exact_number_bytes=4), cache.nbytes() - cache.room_bytes()
    assert measured == claimed, f"the cache holds {measured} bytes, the plan claims {claimed}"
    assert plan.keep <= 0.25


def describe(finding: Finding, plan: Plan, model: Any) -> None:
    places = attachment_of(model).places
    finding.layers = dict(Counter(o.kind for o in plan.own_layers)) | {"compressed": len(places.layers)}
    widths = {(k.width, v.width) for k, v in zip(plan.sites[::2], plan.sites[1::2], strict=True)}
    finding.sites = ", ".join(f"{k} + {v}" for k, v in sorted(widths))
    turning = {s.part for s in plan.sites if s.rotation is not None}
    layouts = {("interleaved" if r.interleaved else "half-split") + f" {r.width}" for r in plan.rotations}
    partly = len([s for s in plan.sites if s.rotation is not None]) < len(places.layers)
    finding.rotation = ", ".join(sorted(layouts)) + (" of values" if turning == {"value"} else "")
    finding.rotation += " in some layers" if partly and turning else ""
    finding.reads = "attention" if places.are_all_read else "rebuilt"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survey_alone(model_type: str) -> Finding:
    """Return how a type fares, in a directory of its own and on one thread."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        return survey(model_type, Path(directory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", type=Path, help="write findings to this file, one a line")
    parser.add_argument("--jobs", type=int, default=1, help="types that are tried at the same time")
    arguments = parser.parse_args()
    if arguments.json:
        arguments.json.unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        tried = [pool.submit(survey_alone, name) for name in arguments.types or causal_types()]
        for finding in (done.result() for done in as_completed(tried)):  # what came is kept if the run is cut
            counts[finding.status] += 1
            print(json.dumps(asdict(finding)), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(asdict(finding)) + "\n")
    print(dict(counts), file=sys.stderr)


if __name__ == "__main__":
    main()
