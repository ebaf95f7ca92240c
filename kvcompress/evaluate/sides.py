"""The two sides of every comparison: the original model and the compressed one, behind one small interface."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import Cache, DynamicCache, context_length, decoder_of
from kvcompress.errors import OptionError
from kvcompress.evaluate.states import decoded_states
from kvcompress.runtime.attach import Attachment, attachment_of
from kvcompress.runtime.calls import uncompressed


@dataclass(frozen=True, slots=True)
class Side:
    """A model as one side of a comparison sees it.

    name: "original" or "compressed". attachment: None for the original. sinks, recent: what a query sees exactly.
    fingerprint: names the side in stored answers; two runs with the same one give the same answers up to rounding.
    block: tokens that are encoded together. With 1, the strictest, exactly `recent` tokens back are seen exactly;
    generation encodes plan.BLOCK_TOKENS at a time, so it sees up to that many more.
    """

    name: str
    model: Any
    attachment: Attachment | None
    sinks: int
    recent: int
    fingerprint: str
    block: int = 1

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_tokens(self) -> int:
        """The longest input that the model was made for, in tokens."""
        return context_length(self.model)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """ids: [batch, n_tokens], padded on the right if at all -> final hidden states [batch, n_tokens, d_model].

        Decode-faithful: each token attends to the compressed form of all tokens older than the window. No mask is
        needed, since a causal model's padding on the right is seen by padding alone.
        """
        with torch.no_grad():
            if self.attachment is None or self.attachment.plan.form == "folded":
                states: Tensor = decoder_of(self.model)(input_ids=ids, use_cache=False)[0]
                return states
            exact = {"sinks": self.sinks, "recent": self.recent}
            return decoded_states(self.model, self.attachment, ids, block=self.block, **exact)

    def new_cache(self) -> Cache:
        """Return an empty cache: the real compressed one, or the model's ordinary one."""
        if self.attachment is None or self.attachment.plan.form == "folded":
            return DynamicCache(config=self.model.config)
        return self.attachment.new_cache()

    def n_compressed(self, position: int) -> int:
        """Return how many of the tokens up to `position`, itself included, its query sees compressed."""
        if self.attachment is None:
            return 0
        return max(0, max(0, position - self.recent) // self.block * self.block - self.sinks)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block the side's model takes the side's own cache, though that may be an uncompressed one."""
        with uncompressed() if self.attachment is None else nullcontext():
            yield


def both_sides(
    model: Any, *, original: Any | None = None, sinks: int | None = None, recent: int | None = None
) -> tuple[Side, Side]:
    """Return (the original's side, the compressed side) of an attached model; sinks and recent: the plan's by default.

    original: the uncompressed model, needed for a folded one only. Raises OptionError if nothing is attached, or
    if a folded model comes without its original.
    """
    attachment = attachment_of(model)
    plan = attachment.plan
    if plan.form == "folded":
        if original is None:
            raise OptionError("a folded model is compared with its original: name that with --base.")
        sinks = recent = 0
    sinks = plan.sinks if sinks is None else sinks
    recent = plan.recent if recent is None else recent
    dtype = dtype_name(model)
    plan_hash = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True, default=str).encode()).hexdigest()[:16]
    exact = Side(
        "original",
        model if original is None else original,
        None,
        0,
        0,
        f"original-{plan.source_fingerprint[:16]}-{dtype}",
    )
    coded = Side("compressed", model, attachment, sinks, recent, f"compressed-{plan_hash}-{sinks}-{recent}-{dtype}")
    return exact, coded


def dtype_name(model: Any) -> str:
    """Return the dtype that a model runs in, as options name it (float32)."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def check_length(side: Side, n_tokens: int) -> None:
    """Raise OptionError if the model was not made for inputs of n_tokens."""
    if n_tokens > side.max_tokens:
        raise OptionError(f"the model reads at most {side.max_tokens} tokens; {n_tokens} were asked for. Ask for less.")
