"""Decoding over a cache of a fixed capacity: on a GPU a step is recorded once as a CUDA graph, and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.compat import PreTrainedModel, cache_argument
from kvcompress.errors import OptionError
from kvcompress.model.replay import WARM_UP, record
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attachment_of
from kvcompress.runtime.static import StaticCache


class GraphDecoder:
    """Decodes one token of each sequence at a time, without Python between the layers once a step is recorded.

    Nothing is recorded on a CPU, nor where a layer's attention has no kernels (docs/speed.md): steps then run through
    the model, with the same results. One decoder serves any number of prompts, of one batch size.
    """

    def __init__(self, model: PreTrainedModel, *, capacity: int) -> None:
        """model: one with a compressed cache attached; capacity: the most tokens of a sequence, prompt included.

        Raises OptionError where the model cannot have a cache of a fixed capacity.
        """
        cache = attachment_of(model).new_cache(capacity=capacity)
        assert isinstance(cache, StaticCache)
        self.model, self.cache = model, cache
        self._cache_argument = cache_argument(model, cache)
        self._replay: Callable[[], None] | None = None
        self._token: Tensor | None = None  # [batch, 1]: a recorded step reads it here
        self._logits: Tensor | None = None  # [batch, vocabulary]: and leaves these
        self._n_steps = 0

    @property
    def recorded(self) -> bool:
        """Whether steps are replays of a CUDA graph."""
        return self._replay is not None

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Read prompts [batch, n_tokens] and return the logits of what follows: [batch, vocabulary].

        What was read before is forgotten. All prompts are of one length, without padding. Raises OptionError if they
        do not fit.
        """
        self.cache.check_capacity(ids.shape[1])
        self.cache.reset()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        output = self.model(ids, position_ids=positions, use_cache=True, logits_to_keep=1, **self._cache_argument)
        return output.logits[:, -1]

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Read a token of each sequence, [batch] or [batch, 1]; return the logits of what follows: [batch, vocabulary].

        Raises OptionError before a prompt was read, and at the capacity, where what was read stays.
        """
        counters = self.cache.tokens.counters
        if counters is None or self.cache.get_seq_length() == 0:
            raise OptionError("no prompt has been read yet: call prefill first.")
        if token.numel() != len(counters.last):
            raise OptionError(f"the cache holds {len(counters.last)} sequences, and here are {token.numel()} tokens.")
        self.cache.make_room()
        if self._token is None:
            self._token = torch.empty_like(token.view(-1, 1))
        self._token.copy_(token.view(-1, 1))
        if self._replay is not None:
            self.cache.tokens.count()  # the host's part of a step, all else is on the device
        elif self._recordable():
            self._replay, self._logits = record(self._forward, self._token.device)
        else:
            self._n_steps += 1
            return self._forward()
        assert self._replay is not None and self._logits is not None
        self._replay()
        return self._logits.clone()

    def generate(self, ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Return prompts and what follows them greedily: [batch, n_tokens + n_new], n_new at most max_new_tokens.

        Ends where every sequence has had an end token of the model's generation_config; what comes after a sequence's
        own is padding. Raises OptionError, before anything is read, if the capacity is too small.
        """
        capacity, n_tokens = self.cache.tokens.capacity, ids.shape[1] + max_new_tokens - 1  # the last is not read
        if max_new_tokens < 1 or n_tokens > capacity:
            raise OptionError(
                f"{ids.shape[1]} tokens and {max_new_tokens} new ones do not fit a cache of {capacity}. "
                "Ask for at least 1 new token, or make the decoder with a larger capacity."
            )
        config = self.model.generation_config
        ends = torch.tensor(config.eos_token_id if config.eos_token_id is not None else [], device=ids.device).view(-1)
        new = [self.prefill(ids).argmax(-1)]
        while len(new) < max_new_tokens:
            if len(new) % BLOCK_TOKENS == 0 and _ended(torch.stack(new, 1), ends).any(1).all():
                break  # looked for once in a while, because it waits for the device
            new.append(self.step(new[-1]).argmax(-1))
        tokens = torch.stack(new, 1)
        after = _ended(tokens, ends).cumsum(1).roll(1, 1) > 0
        after[:, 0] = False
        padding = config.pad_token_id if config.pad_token_id is not None else int(ends[0]) if len(ends) else 0
        tokens = tokens.masked_fill(after, padding)
        return torch.cat([ids, tokens[:, : int((~after).sum(1).max())]], 1)

    def _forward(self) -> Tensor:
        """Return the logits of one step; all that it reads and changes is on the device, at fixed addresses."""
        assert self._token is not None and self.cache.tokens.counters is not None
        length = self.cache.tokens.counters.length
        output = self.model(
            self._token,
            # As a mask of four dimensions the model takes it as it is, instead of making one from the host's numbers.
            attention_mask=torch.ones(len(self._token), 1, 1, 1, dtype=torch.bool, device=length.device),
            position_ids=length.expand(len(self._token), 1).clone(),
            use_cache=True,
            **self._cache_argument,
        )
        return output.logits[:, -1]

    def _recordable(self) -> bool:
        assert self._token is not None
        return self._token.is_cuda and self._n_steps >= WARM_UP and not self.cache.tokens.ran_reference


def _ended(tokens: Tensor, ends: Tensor) -> Tensor:
    """Return where tokens are end tokens: bool, the shape of tokens."""
    return torch.isin(tokens, ends)
