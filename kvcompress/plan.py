"""The plan: what each site keeps, what it costs in bytes and is predicted to cost in nats; kv_plan.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from kvcompress.checkpoint.belonging import check_links, fingerprints
from kvcompress.documents import Count, DocumentError, Finite, Within, read_json, shaped
from kvcompress.errors import CheckpointError
from kvcompress.model.model_spec import DTYPE_BYTES, OwnLayer
from kvcompress.model.rotation import Rotation
from kvcompress.options import BLOCK_TOKENS as BLOCK_TOKENS
from kvcompress.site_plan import Name, SitePlan

#: Version 4 adds rotations and layers of the model's own, 5 a window; each is written as the oldest that can say it.
FORMAT_VERSION, READ_VERSIONS = 5, (3, 4, 5)
PLAN_FILE = "kv_plan.json"
REPORT_FILE = "report.json"

Form = Literal["coded", "folded"]


class Options(TypedDict):
    """What the run time and the reports read of the choices; the others are told as they are."""

    keep: NotRequired[Annotated[float, Within(0, 1)]]
    key_basis: NotRequired[Name]
    value_basis: NotRequired[Name]
    policy: NotRequired[Name]
    metric: NotRequired[Name]
    maps_only: NotRequired[bool]


class Typical(TypedDict):
    """How far the calibration text's own tokens are from it; see codec/distance.py."""

    component_energy: Annotated[float, Within(0, 1e9)]
    gains_at_ends: Annotated[float, Within(0, 1)]


class Calibration(TypedDict):
    """What is told of how the moments were taken; nothing where there were none."""

    sources: NotRequired[list[Name]]
    tokens: NotRequired[Count]
    seq_len: NotRequired[Count]
    text_sha256: NotRequired[Name]
    typical: NotRequired[Typical]


def n_encoded(n_tokens: int, recent: int) -> int:
    """Return how many of n_tokens are encoded: whole blocks of those older than the recent window."""
    return max(0, n_tokens - recent) // BLOCK_TOKENS * BLOCK_TOKENS


def n_dropped(n_tokens: int, n_encoded: int, window: int | None) -> int:
    """Return how many of n_tokens are no longer held: whole blocks of encoded ones that the next token does not see."""
    return 0 if window is None else min(max(0, n_tokens - (window - 1)), n_encoded) // BLOCK_TOKENS * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Plan:
    """A compressed cache, fully described. Sizes in bytes, losses in nats a token."""

    form: Form
    source: Name
    source_fingerprint: Name
    architecture: Name
    dtype: str
    sites: tuple[SitePlan, ...]
    sinks: Annotated[int, Within(0, 1 << 31)]
    recent: Annotated[int, Within(0, 1 << 31)]
    options: dict[str, Any]
    calibration: dict[str, Any]
    #: Whether predicted losses are nats (measured Fisher information) or only relative numbers.
    loss_in_nats: bool
    maps_bytes: Count
    weight_bytes: Count
    #: Fingerprints of the maps and weights that lay beside the plan when it was written; none in earlier outputs.
    files: dict[str, Name] = field(default_factory=dict, compare=False)
    #: How keys (and of latent attention, values) turn, as proven on the loaded model; none in earlier outputs.
    rotations: tuple[Rotation, ...] = ()
    #: Layers that keep transformers' own cache layer: windows, states, and those that cache nothing.
    own_layers: tuple[OwnLayer, ...] = ()
    #: By which the model and its relatives (quantised, fine-tuned) are known; none in earlier outputs, or without text.
    signature: Annotated[tuple[float, ...], Within(0, 1024)] = ()
    #: Where every layer has a sliding window: its tokens, the one that attends included. What left it is not held.
    window: Annotated[int, Within(2, 1 << 40)] | None = None

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

    @property
    def most_maps_bytes(self) -> int:
        """The bytes that the maps can have at most: two float32 rows for each component, block numbers, mean."""
        return sum(s.rank * (8 * s.block_width + 9) + 8 * s.width for s in self.sites if not s.exact)

    def n_encoded(self, n_tokens: int) -> int:
        """Return how many of a sequence's tokens are stored encoded."""
        return n_encoded(n_tokens, self.recent)

    def n_dropped(self, n_tokens: int) -> int:
        """Return how many of a sequence's first tokens are no longer held; see the function n_dropped."""
        return n_dropped(n_tokens, self.n_encoded(n_tokens), self.window)

    def cache_bytes(self, n_tokens: int, *, exact_number_bytes: int | None = None) -> int:
        """Return the bytes that the cache of one sequence of n_tokens takes: packed codes, sinks, window, positions.

        exact_number_bytes: bytes of one number of the sinks and the window; that of the model's dtype by default
        (a bf16 checkpoint run in float32 keeps them in 4 bytes). Positions take 4 bytes a token, once for all layers.
        """
        size = exact_number_bytes or DTYPE_BYTES[self.dtype]
        if self.form == "folded":
            return n_tokens * sum(s.rank for s in self.sites) * size
        own = self.own_bytes(n_tokens, exact_number_bytes)
        encoded, dropped = self.n_encoded(n_tokens), self.n_dropped(n_tokens)
        n_exact = n_tokens - encoded + (self.sinks if encoded and dropped < self.sinks else 0)
        n_tokens, encoded = n_tokens - dropped, encoded - dropped  # those that are held
        whole_layers = {s.layer for s in self.sites} - {s.layer for s in self.sites if not s.exact}
        total = 4 * n_tokens if self.needs_positions else 0
        for s in self.sites:
            if s.layer in whole_layers:
                total += n_tokens * s.width * size
                continue
            encoded_bits = 8 * s.width * size if s.exact else s.bits_per_token
            total += encoded * encoded_bits // 8 + n_exact * s.width * size
        return total + own

    def own_bytes(self, n_tokens: int, exact_number_bytes: int | None = None) -> int:
        """Return the bytes of the layers that are not compressed, after n_tokens of one sequence."""
        size = exact_number_bytes or DTYPE_BYTES[self.dtype]
        return sum(o.nbytes(n_tokens, size) for o in self.own_layers)

    def original_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the model's own cache after n_tokens of one sequence, windows and states as they are."""
        held = n_tokens if self.window is None else min(n_tokens, self.window - 1)
        return held * self.original_bytes_per_token + self.own_bytes(n_tokens)

    def rotation_of(self, site: SitePlan) -> Rotation | None:
        return None if site.rotation is None else self.rotations[site.rotation]

    def save(self, directory: Path) -> None:
        """Write kv_plan.json, to be done after the maps and weights beside it, whose fingerprints it states."""
        version = 5 if self.window else 4 if self.rotations or self.own_layers else 3
        document = {"format_version": version, **asdict(self)}
        document["files"] = fingerprints(directory)
        for name in ("files", "rotations", "own_layers", "signature", "window"):
            if not document[name]:
                del document[name]
        for site in document["sites"]:
            if site["rotation"] is None:
                del site["rotation"]
        document |= self._derived()
        (directory / PLAN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Plan:
        """Return the plan of a compressed checkpoint, every number within its limits.

        Raises CheckpointError with what to do.
        """
        file = directory / PLAN_FILE
        if not file.is_file():
            raise no_output(directory, PLAN_FILE)
        check_links(directory)
        try:
            document = read_json(file)
            version = document.pop("format_version", None)
            if version is not None and version not in READ_VERSIONS:
                raise CheckpointError(
                    f"{file} has format version {version}; this kvcompress reads versions 3 to {FORMAT_VERSION}. "
                    "Use the kvcompress that wrote it, or compress again."
                )
            return _checked(document, version)
        except (DocumentError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Compress again.") from error

    def _derived(self) -> dict[str, Any]:
        """Return the figures that the file states for people, which follow from the others."""
        original, compressed = self.original_bytes_per_token, self.compressed_bytes_per_token
        return {
            "bytes_per_token": {"original": original, "compressed": compressed},
            "keep": self.keep,
            "predicted_loss": self.predicted_loss,
        }


def no_output(directory: Path, missing: str) -> CheckpointError:
    """Return the error of a directory that is not there, or that lacks a file of every output."""
    if not directory.is_dir():
        return CheckpointError(f"{directory} is no directory. Name one that kvcompress compress made.")
    return CheckpointError(f"{directory} has no {missing}: it is not an output of kvcompress compress.")


def _checked(document: dict[str, Any], version: Any) -> Plan:
    """Return the plan in a parsed file. Raises DocumentError where a number is not what it can be."""
    if version is None:
        raise DocumentError("format_version is missing")
    derived = {}
    for name in ("bytes_per_token", "keep", "predicted_loss"):
        if name not in document:
            raise DocumentError(f"{name} is missing")
        derived[name] = document.pop(name)
    plan: Plan = shaped(document, Plan)
    shaped(plan.options, Options, "options")
    shaped(plan.calibration, Calibration, "calibration")
    if plan.dtype not in DTYPE_BYTES:
        raise DocumentError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, found {plan.dtype[:60]!r}")
    if not 0 < len(plan.sites) <= 20_000 or len({s.site for s in plan.sites}) < len(plan.sites):
        raise DocumentError(f"sites must be some, each a different one, found {len(plan.sites)}")
    for i, site in enumerate(plan.sites):
        site.check(f"sites[{i}]")
        if site.rotation is not None and site.rotation >= len(plan.rotations):
            raise DocumentError(f"sites[{i}].rotation is {site.rotation}, of {len(plan.rotations)} rotations")
    if {o.layer for o in plan.own_layers if o.numbers} & {s.layer for s in plan.sites}:
        raise DocumentError("own_layers that hold tokens must be other layers than those of the sites")
    found = shaped(derived, _Derived)
    if found["bytes_per_token"] != plan._derived()["bytes_per_token"]:
        raise DocumentError("bytes_per_token is not what the sites come to")
    for name in ("keep", "predicted_loss"):
        if not math.isclose(found[name], getattr(plan, name), rel_tol=1e-6, abs_tol=1e-9):
            raise DocumentError(f"{name} is {found[name]:g}, the sites come to {getattr(plan, name):g}")
    return plan


class _Bytes(TypedDict):
    original: Count
    compressed: Count


class _Derived(TypedDict):
    bytes_per_token: _Bytes
    keep: Finite
    predicted_loss: Finite
