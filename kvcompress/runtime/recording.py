"""`generate` by recorded steps: over a cache whose addresses stay, a GPU replays the decoder instead of running it.

The loop around it, with its logits, sampling, streaming and stopping, is transformers' own, and so are the tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.errors import Note, OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.site import kernels_apply
from kvcompress.model.replay import WARM_UP, record
from kvcompress.runtime import calls
from kvcompress.runtime.attached import Attached
from kvcompress.runtime.growing import GROWTH
from kvcompress.runtime.static import StaticCache

#: With fewer new tokens than this, recording takes longer than it saves.
_FEWEST_STEPS = 8
#: Tokens for which there is room beyond the prompt, at least.
_LEAST_ROOM = 256


class RecordedCache(StaticCache):
    """A cache at fixed addresses that gets more room when it is full, and whose steps are recorded meanwhile.

    Made for one `generate`: a prompt, then one token of each sequence at a time.
    """

    def __init__(self, codecs: list[LayerKernels], *, sinks: int, recent: int, capacity: int) -> None:
        super().__init__(codecs, sinks=sinks, recent=recent, capacity=capacity)
        self._replay: Callable[[], None] | None = None
        self._token: Tensor | None = None  # [batch, 1]: a recorded step reads it here
        self._output: dict[str, Any] = {}  # and leaves here what the decoder returns, but for its cache
        self._n_steps = 0
        self._refused = False
        self.n_replays = 0

    def check_capacity(self, n_tokens: int) -> None:
        """Make room for n_tokens of a sequence in all. What was recorded reads the old addresses and is forgotten."""
        if n_tokens > self.tokens.capacity:
            self.enlarge(max(n_tokens, capacity_for(self.tokens.capacity)))
            self._replay, self._output = None, {}
            self._n_steps = min(self._n_steps, WARM_UP - 1)  # one more, in which tables are made longer

    def step(
        self, decoder: Any, forward: Callable[..., Any], token: Tensor, others: dict[str, Any], *, cache_name: str
    ) -> Any:
        """Return what the decoder returns for one token of each sequence, [batch, 1], by a replay where that can be.

        forward: the decoder's own; others: what else it is asked for, the same in all steps; cache_name: how it calls
        its cache.
        """
        run = partial(self._run, decoder, forward, others | {cache_name: self})
        self.make_room()
        if self._token is None:
            self._token = torch.empty_like(token)
        self._token.copy_(token)
        if self._replay is not None:
            self.tokens.count()  # the host's part of a step, all else is on the device
        elif not self._record(run):
            self._n_steps += 1
            return run()
        assert self._replay is not None
        self._replay()
        self.n_replays += 1
        kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self._output.items()}
        return self._output_kind(**kept, **{cache_name: self})

    def _record(self, run: Callable[[], Any]) -> bool:
        """Record a step, if it can be, and return whether it is."""
        if self._refused or self._n_steps < WARM_UP or self.tokens.ran_reference:
            return False
        assert self._token is not None
        counted = self.tokens.n_tokens
        try:
            self._replay, output = record(run, self._token.device)
            self._output_kind = type(output)
            self._output = {name: value for name, value in output.items() if value is not self}
        except RuntimeError as error:  # a model that waits for the device, say
            self._refused, self.tokens.n_tokens = True, counted
            torch.cuda.synchronize(self._token.device)
            causes = [(str(cause) or type(cause).__name__).splitlines()[0] for cause in _chain(error)]
            warnings.warn(Note(f"steps are not recorded: {', after '.join(causes)}"), stacklevel=2)
        return not self._refused

    def _run(self, decoder: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Return the decoder's output; all that it reads and changes is on the device, at fixed addresses."""
        assert self._token is not None and self.tokens.counters is not None
        batch, length = len(self._token), self.tokens.counters.length
        positions = length.expand(batch, 1).clone()
        call = calls.Call(self, calls.Arrival(positions, batch, None))
        with calls.running(call):
            output = forward(
                input_ids=self._token,
                # A mask of four dimensions is taken as it is; else one would be made from the host's numbers.
                attention_mask=torch.ones(batch, 1, 1, 1, dtype=torch.bool, device=length.device),
                position_ids=positions,
                use_cache=True,
                **arguments,
            )
        call.prove(self.n_attending, decoder)
        return output


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those in whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__


def capacity_for(n_tokens: int) -> int:
    """Return the capacity with which a cache that holds n_tokens gets room for more."""
    return n_tokens + max(_LEAST_ROOM, n_tokens // GROWTH)


def recorded_cache(
    attachment: Attached, ids: Any, kwargs: dict[str, Any], config: compat.GenerationConfig
) -> RecordedCache | None:
    """Return the cache for a call of `generate` whose steps can be recorded, or None.

    They can on a GPU with kernels, by greedy search or sampling, of prompts [batch, n_tokens] without padding.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not compat.asks_for_plain_steps(kwargs, config):
        return None
    if not recordable(ids.device) or len({p.device for p in attachment.model.parameters()}) > 1:
        return None
    n_prompt, n_new = ids.shape[1], compat.n_new_tokens(kwargs, config, ids.shape[1])
    if n_new < _FEWEST_STEPS or compat.hides_tokens(ids, kwargs, config):
        return None
    try:
        attachment.check_capacity(n_prompt + n_new)
    except OptionError:  # a sliding window, or layers that are not compressed
        return None
    plan, capacity = attachment.plan, min(n_prompt + n_new, capacity_for(n_prompt))
    return RecordedCache(attachment.codecs, sinks=plan.sinks, recent=plan.recent, capacity=capacity)


def recordable(device: torch.device) -> bool:
    """Return whether steps on a device can be recorded, as far as the device goes."""
    return kernels_apply(device)
