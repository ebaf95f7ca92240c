"""The way into an attached model: which cache a forward gets, and the proof that its attention went through it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.errors import OptionError
from kvcompress.runtime import calls
from kvcompress.runtime.attached import Attached
from kvcompress.runtime.attended import AttendedCache
from kvcompress.runtime.recording import RecordedCache
from kvcompress.runtime.simulation import SimulatedCache, simulation_of

#: What every step of `generate` gives a decoder, and a recorded step has from its cache.
_KNOWN = {"attention_mask", "position_ids", "cache_position", "use_cache", *compat.CACHE_NAMES}


class Entrance:
    """Stands in for the `forward` of an attached model's decoder, which it calls.

    Whoever calls the model, by whatever wrapper, comes past here. Nothing of a call is kept here: see calls.py.
    """

    def __init__(self, attachment: Attached, decoder: Any) -> None:
        self._attachment, self._decoder = attachment, decoder
        self._before = decoder.__dict__.get("forward")  # accelerate's, say
        self._forward = decoder.forward
        self._arguments = compat.ForwardArguments.of(decoder)
        self._open = True
        self.__signature__ = inspect.signature(decoder.forward)  # transformers looks at it

    def close(self) -> None:
        """Give the decoder its own forward back; where others have wrapped this one since, pass everything on."""
        self._open = False
        if self._decoder.__dict__.get("forward") is self:
            del self._decoder.forward
            if self._before is not None:
                self._decoder.forward = self._before

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator] # what it calls is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._open:
            return self._forward(*args, **kwargs)
        cache = self._cache_for(args, kwargs)
        if isinstance(cache, RecordedCache) and cache.get_seq_length():
            step = self._step(args, kwargs)
            if step is not None:
                return cache.step(self._decoder, self._forward, *step, cache_name=self._arguments.cache)
        call, expected = calls.Call(cache), self._n_attending(cache)
        if cache is not None:
            args, kwargs = self._arguments.with_cache(args, kwargs, cache)
            call.arriving = self._arriving(cache, args, kwargs)
        with calls.running(call):
            output = self._forward(*args, **kwargs)
        call.prove(expected, self._decoder)
        if cache is not None:
            cache.end()
        return output

    def _n_attending(self, cache: AttendedCache | None) -> int:
        """Return how many attentions of a forward must go through us."""
        if self._attachment.plan.form == "folded":
            return len(self._attachment.codecs)
        return 0 if cache is None else cache.n_attending

    def _cache_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the cache that attention must go through, or None where the caller wants exact keys and values."""
        given = self._arguments.get_cache(args, kwargs)
        if isinstance(given, AttendedCache):
            return given
        if self._attachment.plan.form == "folded":  # keeps its virtual heads in an ordinary cache
            return None
        if given is not None:
            if calls.caches_are_left_alone() or self._decoder.training:
                return None
            raise OptionError(
                f"a compressed cache is attached to the model, and it was given a {type(given).__name__}, which "
                "compresses nothing. Leave the cache out, or make one with model.kvcompress_attachment.new_cache(). "
                "For the model as it was: kvcompress.detach(model), or `with kvcompress.uncompressed():`."
            )
        simulation = simulation_of(self._attachment)
        if simulation is not None:
            return SimulatedCache(self._attachment.codecs, simulation, self._attachment.places)
        use_cache = self._arguments.get("use_cache", args, kwargs)
        use_cache = self._decoder.config.use_cache if use_cache is None else use_cache
        return self._attachment.new_cache() if use_cache and not self._decoder.training else None

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """Return the token of each sequence that a forward reads and what else it is asked for, or None.

        None where it reads more, or is given tensors that a recorded step could not know.
        """
        given = dict(zip(self._arguments.names, args, strict=False)) | kwargs
        token = given.pop("input_ids", None)
        others = {name: value for name, value in given.items() if value is not None and name not in _KNOWN}
        if token is None or token.shape[1] != 1 or any(isinstance(value, Tensor) for value in others.values()):
            return None
        return token, others

    def _arriving(self, cache: AttendedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> calls.Arrival:
        """Return what a forward brings to its cache."""
        tokens = self._arguments.get("input_ids", args, kwargs)
        if tokens is None:
            tokens = self._arguments.get("inputs_embeds", args, kwargs)
        positions: Tensor | None = self._arguments.get("position_ids", args, kwargs)
        if positions is None:
            start = cache.get_seq_length()
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        if positions.dim() == 3:  # of images and text: time, height and width, of text all the same
            # Any positions give back what was encoded, if they are kept: those of images cost a little accuracy.
            positions = positions[-3]
        return calls.Arrival(positions, tokens.shape[0], self._arguments.get("attention_mask", args, kwargs))
