"""What a user chooses for a healing: what is trained, on which text, for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvcompress.errors import OptionError
from kvcompress.options import read_recipe

#: maps: means, encoders, decoders and steps, or the head mixing of a folded output; attention: projections and norms
#: too (folded outputs); all: every weight (folded outputs).
TRAINED = ("maps", "attention", "all")
#: Text that needs no download and is public domain or Python's own.
DEFAULT_TEXT = ("builtin:prose", "builtin:code")
_WEIGHTS_RATE = 5e-4
PRECISIONS = ("auto", "bf16", "float32")
#: More tokens, steps or windows than anyone trains for.
_MOST = 1 << 40


@dataclass(frozen=True, slots=True)
class HealOptions:
    """Everything that decides what a healing gives. Field names are those of a recipe's TOML keys."""

    train: str = "maps"
    #: Text sources, each a kind of its own: a healing must make none of them worse.
    text: tuple[str, ...] = DEFAULT_TEXT
    tokens: int = 2_000_000
    seq_len: int = 2048
    #: Windows of seq_len tokens in a step, over all devices.
    batch: int = 16
    #: Windows of a step that one device takes at once; the rest follows by accumulation.
    device_batch: int = 8
    #: Peak learning rate of the weights, with `maps` of the norms of heads; None: 5e-4.
    learning_rate: float | None = None
    #: Peak learning rate of maps, in units of the error that the codec makes there anyway (heal/site.py).
    maps_rate: float = 1e-2
    #: The share of the steps in which the rate rises; then it falls as a cosine.
    warmup: float = 0.05
    weight_decay: float = 0.0
    #: Weights of the losses: KL(original || healed), distance of final hidden states, the text's own loss. A little of
    #: the last takes from the perplexity what the compression added, and leaves KL where it is (docs/healing.md).
    kl_loss: float = 1.0
    hidden_loss: float = 0.0
    text_loss: float = 0.05
    #: Windows of each source that are kept out of the training, to choose the best weights by.
    held_out: int = 8
    #: How often held-out loss is measured; after `patience` times without a new best the training stops.
    evaluations: int = 8
    patience: int = 3
    #: RMSNorm of every head's output before the output projection (arXiv 2601.19611, Eq. 12); folded outputs.
    head_norm: bool = False
    gradient_checkpointing: bool = False
    #: torch.compile for the layers of both models, in training: more tokens a second once compiled; folded outputs.
    compile: bool = False
    #: On a GPU, too, the same bits every time (on a CPU they are), so that a resumed training ends as an unbroken one.
    deterministic: bool = False
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (("train", self.train, TRAINED), ("precision", self.precision, PRECISIONS)):
            if value not in choices:
                raise OptionError(f"{name} '{value}' is unknown. Choose from {', '.join(choices)}.")
        if not isinstance(self.text, tuple) or not self.text or not all(isinstance(s, str) for s in self.text):
            raise OptionError(f"text must be a list of at least one text source, found {self.text!r}.")
        if len(set(self.text)) < len(self.text):
            raise OptionError("a text is named twice. Name each source once.")
        for name, least in (
            ("tokens", 1),
            ("seq_len", 16),
            ("batch", 1),
            ("device_batch", 1),
            ("held_out", 1),
            ("evaluations", 1),
            ("patience", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                raise OptionError(f"{name} must be a whole number from {least} to {_MOST}, found {value!r}.")
        for name in ("maps_rate", "warmup", "weight_decay", "kl_loss", "hidden_loss", "text_loss"):
            _check_number(name, getattr(self, name), below=1.0 if name == "warmup" else None)
        if not (self.kl_loss or self.hidden_loss or self.text_loss):
            raise OptionError("all losses have the weight 0, so nothing would be trained. Give one a weight.")
        if self.learning_rate is not None:
            _check_number("learning_rate", self.learning_rate)

    @property
    def weights_rate(self) -> float:
        return _WEIGHTS_RATE if self.learning_rate is None else self.learning_rate

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"text": list(self.text)}


def load_heal_recipe(file: Path, **overrides: Any) -> HealOptions:
    """Return the options of a TOML recipe, with overrides that are not None on top. Raises OptionError."""
    return with_heal_overrides(read_recipe(file, HealOptions, texts="text"), **overrides)


def with_heal_overrides(options: HealOptions, **overrides: Any) -> HealOptions:
    """Return the options with every override that is not None put in place."""
    return replace(options, **{k: v for k, v in overrides.items() if v is not None})


def _check_number(name: str, value: Any, *, below: float | None = None) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < (below or float("inf"))
    if not fits:
        limit = f" and below {below:g}" if below else ""
        raise OptionError(f"{name} must be a number of at least 0{limit}, found {value!r}.")
