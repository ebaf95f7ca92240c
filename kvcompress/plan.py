"""The plan: what each site keeps, what it costs in bytes and is predicted to cost in nats; kv_plan.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvcompress.errors import CheckpointError
from kvcompress.model.model_spec import DTYPE_BYTES, Part, Site
from kvcompress.options import BLOCK_TOKENS as BLOCK_TOKENS
from kvcompress.options import GAIN_BITS, is_turn

FORMAT_VERSION = 3
PLAN_FILE = "kv_plan.json"
REPORT_FILE = "report.json"

Form = Literal["coded", "folded"]


def n_encoded(n_tokens: int, recent: int) -> int:
    """Return how many of n_tokens are encoded: whole blocks of those older than the recent window."""
    return max(0, n_tokens - recent) // BLOCK_TOKENS * BLOCK_TOKENS


def runs(bits: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (bits, first component, one past the last) of each run of components of equal bits."""
    found: list[tuple[int, int, int]] = []
    for i, b in enumerate(bits):
        if found and found[-1][0] == b:
            found[-1] = (b, found[-1][1], i + 1)
        else:
            found.append((b, i, i + 1))
    return found


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What one site keeps. An exact site has no maps and keeps everything in the model's own dtype."""

    layer: int
    part: Part
    basis: str
    width: int
    #: (bits, components) with bits falling: the bits of every component, in the order in which they are stored.
    bits: tuple[tuple[int, int], ...]
    predicted_loss: float
    #: Numbers that are mixed together; a component's maps are two vectors of this width.
    block_width: int
    #: Keys only: encoded after RoPE, because the basis commutes with it, or never rotated; other keys are un-rotated,
    #: encoded and rebuilt.
    rotated: bool
    #: Tokens whose keys are un-rotated by one position, that of the first of them; 1 where each has its own, or none.
    turn: int = 1

    @property
    def site(self) -> Site:
        return Site(self.layer, self.part)

    @property
    def rank(self) -> int:
        """Components that are kept."""
        return sum(n for _, n in self.bits)

    @property
    def component_bits(self) -> tuple[int, ...]:
        return tuple(b for b, n in self.bits for _ in range(n))

    @property
    def exact(self) -> bool:
        return self.rank == self.width and not self.quantised

    @property
    def quantised(self) -> bool:
        return any(b < 16 for b, _ in self.bits)

    @property
    def bits_per_token(self) -> int:
        """Bits stored for a token: its components, and its gain where any of them is quantised."""
        return sum(b * n for b, n in self.bits) + (GAIN_BITS if self.quantised else 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """A compressed cache, fully described. Sizes in bytes, losses in nats a token."""

    form: Form
    source: str
    source_fingerprint: str
    architecture: str
    dtype: str
    sites: tuple[SitePlan, ...]
    sinks: int
    recent: int
    options: dict[str, Any]
    calibration: dict[str, Any]
    #: Whether predicted losses are nats (measured Fisher information) or only relative numbers.
    loss_in_nats: bool
    maps_bytes: int
    weight_bytes: int

    @property
    def n_layers(self) -> int:
        return max(s.layer for s in self.sites) + 1

    @property
    def original_bytes_per_token(self) -> int:
        return sum(s.width for s in self.sites) * DTYPE_BYTES[self.dtype]

    @property
    def compressed_bytes_per_token(self) -> int:
        """A last half byte, where gains come to one, is rounded up."""
        return -(-sum(s.bits_per_token for s in self.sites) // 8)

    @property
    def keep(self) -> float:
        """The share of the cache's bytes that remains for tokens beyond the window."""
        return sum(s.bits_per_token for s in self.sites) / 8 / self.original_bytes_per_token

    @property
    def predicted_loss(self) -> float:
        return sum(s.predicted_loss for s in self.sites)

    @property
    def needs_positions(self) -> bool:
        """Whether token positions must be kept: to rotate rebuilt keys, or the mean of keys that are cached rotated."""
        return self.form == "coded" and any(s.part == "key" and not s.exact for s in self.sites)

    def n_encoded(self, n_tokens: int) -> int:
        """Return how many of a sequence's tokens are stored encoded."""
        return n_encoded(n_tokens, self.recent)

    def cache_bytes(self, n_tokens: int, *, exact_number_bytes: int | None = None) -> int:
        """Return the bytes that the cache of one sequence of n_tokens takes: packed codes, sinks, window, positions.

        exact_number_bytes: bytes of one number of the sinks and the window; that of the model's dtype by default
        (a bf16 checkpoint run in float32 keeps them in 4 bytes). Positions take 4 bytes a token, once for all layers.
        """
        size = exact_number_bytes or DTYPE_BYTES[self.dtype]
        if self.form == "folded":
            return n_tokens * sum(s.rank for s in self.sites) * size
        encoded = self.n_encoded(n_tokens)
        whole_layers = {s.layer for s in self.sites} - {s.layer for s in self.sites if not s.exact}
        total = 4 * n_tokens if self.needs_positions else 0
        for s in self.sites:
            if s.layer in whole_layers:
                total += n_tokens * s.width * size
                continue
            n_exact = n_tokens - encoded + (self.sinks if encoded else 0)
            encoded_bits = 8 * s.width * size if s.exact else s.bits_per_token
            total += encoded * encoded_bits // 8 + n_exact * s.width * size
        return total

    def save(self, directory: Path) -> None:
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        document["bytes_per_token"] = {
            "original": self.original_bytes_per_token,
            "compressed": self.compressed_bytes_per_token,
        }
        document["keep"] = self.keep
        document["predicted_loss"] = self.predicted_loss
        (directory / PLAN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Plan:
        """Return the plan of a compressed checkpoint. Raises CheckpointError with what to do."""
        file = directory / PLAN_FILE
        if not file.is_file():
            raise CheckpointError(f"{directory} has no {PLAN_FILE}: it is not an output of kvcompress compress.")
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            version = document.pop("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{file} has format version {version}; this kvcompress reads version {FORMAT_VERSION}. "
                    "Use the kvcompress that wrote it, or compress again."
                )
            for derived in ("bytes_per_token", "keep", "predicted_loss"):
                document.pop(derived)
            document["sites"] = tuple(_site_plan(s) for s in document["sites"])
            plan = cls(**document)
            _ = plan.keep, plan.n_layers, plan.cache_bytes(plan.recent + 1)  # raises where a field is no such thing
            return plan
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Compress again.") from error


def _site_plan(record: dict[str, Any]) -> SitePlan:
    bits = tuple((int(b), int(n)) for b, n in record["bits"])
    if not is_turn(record["turn"]):
        raise ValueError(f"turn {record['turn']!r} of layer {record['layer']}")
    return SitePlan(**(record | {"bits": bits}))
