"""What compressing layers with a sliding window would gain: the share of a model's own cache that is left, by length.

    python recipes/window_gain.py

Layers whose cache grows with the text are compressed in both columns; those with a window stay as they are in one
(what kvcompress does where a model has both) and are compressed in the other (what it does where all have one).
A calculation from the shapes of published models, at keep 0.125 beyond an exact window of 64; no model is run.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.plan import n_dropped, n_encoded

KEEP, RECENT = 0.125, 64
LENGTHS = (2048, 32768, 131072)


@dataclass(frozen=True)
class Shape:
    """Layers with a window and without, the window, numbers of a token in one layer of each kind."""

    name: str
    n_windows: int
    n_full: int
    window: int
    window_numbers: int
    full_numbers: int


SHAPES = (
    Shape("Gemma 3 270M", 15, 3, 512, 2 * 1 * 256, 2 * 1 * 256),
    Shape("Gemma 3 27B", 52, 10, 1024, 2 * 16 * 128, 2 * 16 * 128),
    Shape("gpt-oss-20b", 12, 12, 128, 2 * 8 * 64, 2 * 8 * 64),
    Shape("Mistral 7B v0.1", 32, 0, 4096, 2 * 8 * 128, 0),
)


def compressed(n_tokens: int, window: int | None) -> float:
    """Return how many tokens' worth of exact numbers a compressed layer holds after n_tokens."""
    encoded = n_encoded(n_tokens, RECENT)
    held = encoded - n_dropped(n_tokens, encoded, window)
    return (n_tokens - encoded) + KEEP * held


def shares(shape: Shape, n_tokens: int) -> tuple[float, float]:
    """Return the shares of the model's own cache that are left: with windows as they are, and compressed as well."""
    window = min(n_tokens, shape.window - 1)
    own = shape.n_windows * shape.window_numbers * window + shape.n_full * shape.full_numbers * n_tokens
    full = shape.n_full * shape.full_numbers * compressed(n_tokens, None)
    windows = shape.n_windows * shape.window_numbers
    return (full + windows * window) / own, (full + windows * compressed(n_tokens, shape.window)) / own


def main() -> None:
    print("| model | tokens | windows as they are | windows compressed |\n|---|---|---|---|")
    for shape in SHAPES:
        for n_tokens in LENGTHS:
            kept, both = shares(shape, n_tokens)
            print(f"| {shape.name} | {n_tokens:,} | {kept:.1%} | {both:.1%} |")


if __name__ == "__main__":
    main()
