"""`kvcompress generate`: text from the compressed model, and the bytes that its cache really took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.compat import Cache
    from kvcompress_cli.loading import Loaded


@dataclass(frozen=True)
class Generation:
    """Text and its cost. original_bytes: the same tokens in the model's own cache, in the checkpoint's dtype."""

    text: str
    new_tokens: int
    seconds: float
    measured_bytes: int
    original_bytes: int


def generate(
    output: flags.CompressedDirectory,
    prompt: Annotated[str, typer.Option(help="The text to continue.", metavar="TEXT")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 40) - 1, help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    base: flags.Base = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    json: flags.Json = False,
) -> None:
    """Continue a prompt with the compressed cache, and measure that cache's bytes.

    The sinks and the recent window stay exact, so a short text saves little.
    """
    from kvcompress_cli.loading import load_compressed

    loaded = load_compressed(output, base=base, device=device, dtype=dtype)
    result = continue_prompt(
        loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat
    )
    if json:
        cache_bytes = {"measured": result.measured_bytes, "original": result.original_bytes}
        document = {"prompt": prompt, "text": result.text, "new_tokens": result.new_tokens, "seconds": result.seconds}
        terminal.print_json(document | {"cache_bytes": cache_bytes})
    else:
        print_generation(prompt, result, loaded)


def continue_prompt(
    loaded: Loaded, prompt: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, chat: bool = False
) -> Generation:
    """Return the text that the model, compressed or detached, continues the prompt with."""
    import torch

    from kvcompress.compat import cache_argument

    model = loaded.model
    inputs = _encoded(loaded.tokenizer, prompt, chat=chat).to(model.device)
    # None for what only sampling uses: a checkpoint's own generation_config may set it
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    ids = inputs.pop("input_ids")
    options = {**inputs, "max_new_tokens": max_new_tokens, **sampling}
    cache = empty_cache(loaded, ids, options)
    torch.manual_seed(seed)
    started = time.monotonic()
    output = model.generate(ids, **cache_argument(model, cache), **options)
    seconds = time.monotonic() - started
    new = output[0, ids.shape[1] :]
    return Generation(
        text=loaded.tokenizer.decode(new, skip_special_tokens=True),
        new_tokens=len(new),
        seconds=seconds,
        measured_bytes=allocated_bytes(cache),
        original_bytes=loaded.plan.original_bytes(cache.get_seq_length()),
    )


def empty_cache(loaded: Loaded, ids: Any, options: dict[str, Any]) -> Cache:
    """Return the cache for a form and a call of `generate`: a folded or a detached model uses an ordinary one."""
    from kvcompress.compat import DynamicCache

    attachment = loaded.model.__dict__.get("kvcompress_attachment")
    if attachment is None or loaded.plan.form == "folded":
        return DynamicCache(config=loaded.model.config)
    return attachment.generation_cache(ids, **options)  # type: ignore[no-any-return]


def allocated_bytes(cache: Any) -> int:
    """Return the bytes of a cache's storages."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _encoded(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    from kvcompress.errors import OptionError

    if chat:
        if not tokenizer.chat_template:
            raise OptionError("the model has no chat template. Leave out --chat.")
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].shape[1]:
        raise OptionError("the prompt has no tokens. Give --prompt some text.")
    return inputs


def print_generation(prompt: str, result: Generation, loaded: Loaded) -> None:
    from rich.markup import escape

    console = terminal.stdout()
    console.print(f"[dim]{escape(prompt)}[/dim]{escape(result.text)}\n", soft_wrap=True)
    speed = result.new_tokens / result.seconds
    console.print(f"{result.new_tokens} new tokens in {result.seconds:.1f} s ({speed:.1f} tokens/s)")
    run_dtype = str(loaded.model.dtype).removeprefix("torch.")
    note = "" if run_dtype == loaded.plan.dtype else f" (this run keeps exact tokens in {run_dtype})"
    console.print(
        f"cache: {terminal.size(result.measured_bytes)} measured{note}, "
        f"{terminal.size(result.original_bytes)} uncompressed in {loaded.plan.dtype}"
    )
