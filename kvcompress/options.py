"""What a user chooses for a compression, and recipes: the same choices in a TOML file."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from kvcompress.documents import DocumentError, parse_toml, read_text, shaped
from kvcompress.errors import OptionError

KEY_BASES = ("head", "share", "frequency", "band", "per_head", "latent")
VALUE_BASES = ("head", "per_head", "latent")
#: Bits that a component may have beside none and all. Steps of one bit between them were not better on real models
#: (docs/measurements.md), and these never straddle a byte.
LEVELS = (1, 2, 4, 8)
#: Tokens leave the recent window and are packed in blocks of this size.
BLOCK_TOKENS = 32
#: Components of one block and of equal bits that are stored as one in the tile layout, which rows have whose keys are
#: in turns of a multiple of TILE_TOKENS.
QUAD, TILE_TOKENS = 4, 128
#: Tokens of a turn where the tool chooses, and what a head must have for GPU kernels to take its keys in turns.
DEFAULT_TURN, TURN_HEAD_DIMS = 256, (64, 96, 128, 256)
#: Bits of the code of a token's gain, where any component of its site is quantised.
GAIN_BITS = 4
#: Bases whose components are single numbers (or complex ones), so that each can have bits of its own.
BIT_BASES = ("frequency", "band", "per_head", "latent")
#: Key bases that commute with RoPE and so can be folded into the projections.
FOLDABLE_KEY_BASES = ("head", "share", "frequency")
#: Key bases that are encoded before RoPE, un-rotated by the token's own position or by that of its turn.
UNROTATED_KEY_BASES = ("band", "per_head", "latent")
#: Heads in groups that share virtual heads, keys and values alike: for folding only (grouping.py).
GROUPED = "grouped"
POLICY_NAMES = ("uniform", "middle", "energy", "loss")
_MOST_RECIPE_BYTES = 1 << 16
METRICS = ("fisher", "activation", "weights")
_Options = TypeVar("_Options")
#: What may be left to the tool.
_UNDECIDED = ("maps_only", "refit")


#: What a choice of a number may be at least and at most.
_LIMITS = {
    "tokens": (1, 1 << 40),
    "per_group": (1, 1 << 20),
    "seq_len": (16, 1 << 24),
    "sinks": (0, 1 << 24),
    "recent": (0, 1 << 24),
    "band": (2, 1 << 20),
    "seed": (0, (1 << 40) - 1),
}


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """Everything that decides what a compressed checkpoint holds. Field names are those of a recipe's TOML keys."""

    keep: float = 0.25
    key_basis: str = "latent"
    value_basis: str = "latent"
    #: KV heads per block of `latent`; None chooses the most that keeps all maps within 3% of the weights.
    group: int | None = None
    #: Virtual heads that each group of KV heads keeps; for `grouped`.
    per_group: int = 1
    #: Channels of each head in a block of `band`.
    band: int = 16
    #: Tokens whose keys are un-rotated by one position, that of the first of them; 1: each key by its own. None: of
    #: `latent` keys as many as suit the GPU kernels, in layers that those take (see choose.turning).
    turn: int | None = None
    policy: str = "loss"
    #: Which layers the policy `middle` compresses: half, deep or START:STOP.
    layers: str = "half"
    #: fisher: C and F (nats); activation: C only; weights: the projections alone, no text.
    metric: str = "fisher"
    #: 16-bit components (32-bit in float32 checkpoints) instead of bits shared out by the policy.
    ranks_only: bool = False
    calibration: tuple[str, ...] = field(default=())
    tokens: int = 65536
    seq_len: int = 2048
    sinks: int = 4
    recent: int = 64
    folded: bool = False
    #: None: by the size of the weights (pipeline.py).
    maps_only: bool | None = None
    #: Whether values' decoders are fitted once more, to what the model's queries read of them; None: where the model
    #: is at hand or small (calibration.at_hand).
    refit: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_values()
        self._check_turn()
        self._check_bases()
        if self.seq_len <= self.sinks:
            raise OptionError(f"seq_len {self.seq_len} must be above sinks {self.sinks}.")
        if self.folded and self.maps_only:
            raise OptionError("--folded changes the projections, so it cannot be written as --maps-only.")

    def _check_values(self) -> None:
        """Check each choice by itself."""
        _check_choice("key_basis", self.key_basis, (*KEY_BASES, GROUPED))
        _check_choice("value_basis", self.value_basis, VALUE_BASES)
        _check_choice("policy", self.policy, POLICY_NAMES)
        _check_choice("metric", self.metric, METRICS)
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise OptionError(
                f"keep must be above 0 and at most 1 (the share of the cache that stays), found {self.keep}."
            )
        if self.group is not None and (not _is_whole(self.group) or self.group < 1):
            raise OptionError(f"group must be a whole number of at least 1, found {self.group!r}.")
        if not isinstance(self.calibration, tuple) or not all(isinstance(s, str) for s in self.calibration):
            raise OptionError(f"calibration must be a list of texts, found {self.calibration!r}.")
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise OptionError(f"{name} must be a whole number of at least {least}, found {value!r}.")
            if value > most:
                raise OptionError(f"{name} must be a whole number of at most {most}.")
        for name in ("folded", "maps_only", "ranks_only", "refit"):
            undecided = name in _UNDECIDED and getattr(self, name) is None
            if not isinstance(getattr(self, name), bool) and not undecided:
                raise OptionError(f"{name} must be true or false, found {getattr(self, name)!r}.")
        if not isinstance(self.layers, str) or not re.fullmatch(r"half|deep|\d+:\d+", self.layers):
            raise OptionError(f"layers {self.layers!r} is none of half, deep, START:STOP (for example 8:24).")

    def _check_bases(self) -> None:
        """Check whether bits, and a fold, are possible with the bases."""
        if self.key_basis == GROUPED and (not self.folded or self.value_basis != "latent"):
            raise OptionError(
                "key basis 'grouped' is for --folded, with --value-basis latent (values share its groups)."
            )
        if self.quantised:
            for name in ("key_basis", "value_basis"):
                if getattr(self, name) not in BIT_BASES:
                    raise OptionError(
                        f"{name.replace('_', ' ')} '{getattr(self, name)}' keeps or drops whole heads, so it has no "
                        f"bits to share out. Add --ranks-only, or choose from {', '.join(BIT_BASES)}."
                    )
        if self.folded and self.key_basis not in (GROUPED, *FOLDABLE_KEY_BASES):
            raise OptionError(
                f"key basis '{self.key_basis}' does not commute with RoPE, so it cannot be folded. "
                f"Choose --key-basis from {', '.join((GROUPED, *FOLDABLE_KEY_BASES))}, or leave out --folded."
            )
        if self.folded and self.value_basis == "per_head":
            raise OptionError("value basis 'per_head' makes no whole virtual heads. Use latent or head with --folded.")

    def _check_turn(self) -> None:
        if self.turn is None:
            return
        if not is_turn(self.turn):
            raise OptionError(
                f"turn must be 1 or a power of two of at least {BLOCK_TOKENS} (32, 64, 128, ...), found {self.turn!r}."
            )
        if self.turn > 1 and self.key_basis not in UNROTATED_KEY_BASES:
            raise OptionError(
                f"turn {self.turn} is for keys that are un-rotated, and key basis '{self.key_basis}' encodes them "
                f"after RoPE. Choose --key-basis from {', '.join(UNROTATED_KEY_BASES)}, or leave out --turn."
            )

    @property
    def quantised(self) -> bool:
        """Whether components get bits; a fold is linear, so it cannot."""
        return not (self.ranks_only or self.folded)

    @property
    def at_a_time(self) -> int:
        """Neighbouring components of a block that are kept, and given bits, as one: QUAD where rows can have tiles."""
        by_heads = {self.key_basis, self.value_basis} <= {"per_head", "latent"}
        return QUAD if by_heads and self.most_turn % TILE_TOKENS == 0 else 1

    @property
    def most_turn(self) -> int:
        """Tokens of a turn, where there are turns."""
        if self.turn is not None:
            return self.turn
        by_groups = self.key_basis == self.value_basis == "latent" and not self.folded
        return DEFAULT_TURN if by_groups else 1

    def to_json(self) -> dict[str, Any]:
        """Return all options by name; those that are not decided yet are left out."""
        found = asdict(self) | {"calibration": list(self.calibration)}
        return {name: value for name, value in found.items() if name not in _UNDECIDED or value is not None}


def is_turn(n_tokens: Any) -> bool:
    """Return whether keys can be un-rotated in turns of n_tokens: 1, or a power of two that whole blocks fill."""
    if not _is_whole(n_tokens) or n_tokens > 1 << 20:
        return False
    return n_tokens == 1 or (n_tokens >= BLOCK_TOKENS and n_tokens & (n_tokens - 1) == 0)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def load_recipe(file: Path, **overrides: Any) -> CompressOptions:
    """Return the options of a TOML recipe, with overrides that are not None on top."""
    return with_overrides(read_recipe(file, CompressOptions, texts="calibration"), **overrides)


def read_recipe(file: Path, kind: type[_Options], *, texts: str) -> _Options:
    """Return the options of a TOML recipe, a dataclass. texts: its list of texts, for which one alone may stand.

    Raises OptionError with what is wrong.
    """
    try:
        values = parse_toml(read_text(file, most=_MOST_RECIPE_BYTES))
    except FileNotFoundError as error:
        raise OptionError(f"recipe {file} does not exist.") from error
    except OSError as error:
        raise OptionError(f"recipe {file} cannot be read: {error.strerror}.") from error
    except DocumentError as error:
        raise OptionError(f"recipe {file} is not valid TOML: {error}.") from error
    known = {f.name for f in fields(cast(Any, kind))}
    unknown = sorted(set(values) - known)
    if unknown:
        raise OptionError(f"recipe {file} has an unknown key '{unknown[0]}'. Known keys: {', '.join(sorted(known))}.")
    if isinstance(values.get(texts), str):
        values[texts] = [values[texts]]
    try:
        return cast(_Options, shaped(values, kind))
    except DocumentError as error:
        raise OptionError(f"recipe {file}: {error}.") from error


def with_overrides(options: CompressOptions, **overrides: Any) -> CompressOptions:
    """Return the options with every override that is not None put in place."""
    return replace(options, **{k: v for k, v in overrides.items() if v is not None})


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} '{value}' is unknown. Choose from {', '.join(choices)}.")
