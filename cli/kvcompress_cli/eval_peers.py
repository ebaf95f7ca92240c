"""`kvcompress eval MODEL --cache NAME`: a quantised cache of others on an uncompressed model, measured as ours is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from kvcompress.evaluate.perplexity import Evaluation

#: All of PEERS, named here so that --help need not import torch.
NAMES = (
    "hqq-4bit, hqq-2bit, hqq-4bit-once, hqq-2bit-once, quanto-4bit, quanto-2bit, quanto-4bit-once, "
    "quanto-2bit-once, kivi-4bit, kivi-2bit, fp8, fp8-unscaled, turboquant-k8v4, turboquant-k8v4-all-layers, "
    "turboquant-4bit_nc, turboquant-4bit_nc-all-layers, turboquant-k3v4_nc, turboquant-k3v4_nc-all-layers, "
    "turboquant-3bit_nc, turboquant-3bit_nc-all-layers, int8-per-token-head, fp8-per-token-head, nvfp4, ultraquant, "
    "ultraquant-all-layers"
)


def measure_peer(
    source: str,
    cache: str,
    text: str,
    *,
    seq_len: int,
    max_windows: int | None,
    residual: int | None,
    device: str,
    dtype: str,
) -> Evaluation:
    """Return the library's evaluation of a peer, with progress on stderr. residual: its exact window, or its own."""
    from kvcompress.evaluate.peer_run import evaluate_peer
    from kvcompress.evaluate.peers import find_peer
    from kvcompress.evaluate.perplexity import Original
    from kvcompress.evaluate.windows import Windows
    from kvcompress_cli.loading import opened_model
    from kvcompress_cli.progress import stage_progress

    peer = find_peer(cache, residual=residual)
    with (
        stage_progress() as progress,
        opened_model(source, device=device, dtype=dtype) as (checkpoint, model, tokenizer),
    ):
        original = Original(model, Windows.of(tokenizer, text, seq_len, max_windows))
        return evaluate_peer(
            model, original, peer, checkpoint.spec, progress=lambda done, total: progress("eval", done, total)
        )


def show_peer(source: str, cache: str, text: str, *, json: bool, **settings: Any) -> None:
    """Measure a peer and print its figures; settings are those of `measure_peer`."""
    from kvcompress_cli.eval_perplexity import show

    evaluation = measure_peer(source, cache, text, **settings)
    if json:
        terminal.print_json(evaluation.to_json())
        return
    show(evaluation)
    _print_bytes(evaluation)


def _print_bytes(evaluation: Evaluation) -> None:
    cache = evaluation.protocol["cache"]
    seq_len = evaluation.protocol["seq_len"]
    grid = terminal.facts()
    grid.add_row("cache", f"{cache['name']}, stored in {cache['stored_dtype']}")
    grid.add_row("bytes a token", f"{cache['bytes_per_token']:,.0f} beyond the window, scales and zeros included")
    grid.add_row("measured", f"{terminal.size(cache['bytes_at_seq_len'])} at the end of {seq_len} tokens")
    terminal.stdout().print(grid)
