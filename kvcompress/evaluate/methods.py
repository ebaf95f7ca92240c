"""What `compare` compares: our default, published methods in our implementation, and peers; names -> cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvcompress.errors import OptionError
from kvcompress.evaluate.peer_xkv import Xkv
from kvcompress.evaluate.peers import PEERS, Peer
from kvcompress.options import CompressOptions, load_recipe

Kind = Literal["ours", "published", "peer"]

#: Free mixing of all heads by the activations alone, each token at its own position: whatever our default is.
_LATENT: dict[str, Any] = {"key_basis": "latent", "value_basis": "latent", "turn": 1, "metric": "activation"}
#: Published methods that our bases and policies can be: what they change in the options (recipes/*.toml say why).
PUBLISHED: dict[str, dict[str, Any]] = {
    "palu": {**_LATENT, "policy": "uniform", "ranks_only": True},
    # PCA of un-rotated keys and of values, bits by what is left of the squared error (arXiv 2511.01815). Here a layer's
    # own keys and values are mixed, as a live cache needs them, where the paper mixes all layers'; no entropy coding.
    "kvtc": {**_LATENT, "policy": "loss"},
    "kvtc-deflate": {**_LATENT, "policy": "loss"},  # the same, its codes deflated where they are counted
    "mea-half": {
        "key_basis": "head",
        "value_basis": "head",
        "turn": 1,
        "policy": "middle",
        "layers": "half",
        "metric": "weights",
        "ranks_only": True,
    },
}
#: Published methods in files of their own: evaluate/peer_kqsvd.py, evaluate/peer_xkv.py.
OWN_FILES = ("kq-svd", "xkv")
OURS: dict[str, dict[str, Any]] = {"default": {}}
#: A family stands for all of its peers.
FAMILIES = ("kivi", "hqq", "quanto", "fp8", "turboquant", "per-token-head", "fp4")
ALL_METHODS = (*OURS, *PUBLISHED, *OWN_FILES, *FAMILIES)


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure: a method at a budget, or a peer, which has the budget it has."""

    method: str
    kind: Kind
    options: CompressOptions | None = None
    peer: Peer | Xkv | None = None

    @property
    def keep(self) -> float | None:
        """The budget asked for; None for a peer that has the one it has."""
        return None if self.options is None else self.options.keep

    def to_json(self) -> dict[str, Any]:
        """Return everything that decides the cell's figures, the model and the text apart."""
        options = None if self.options is None else self.options.to_json()
        return {"method": self.method, "options": options, "peer": self.peer and asdict(self.peer)}


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare. options: how our methods calibrate, their sinks and window."""

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    text: str
    options: CompressOptions
    seq_len: int = 2048
    max_windows: int | None = None

    def cells(self) -> list[Cell]:
        return cells_of(self.methods, self.keeps, self.options)

    def to_json(self) -> dict[str, Any]:
        """Return what was asked for, so that it can be asked for again."""
        chosen = {name: getattr(self.options, name) for name in ("tokens", "seq_len", "sinks", "recent", "seed")}
        return {
            "methods": list(self.methods),
            "keeps": list(self.keeps),
            "text": self.text,
            "max_windows": self.max_windows,
            "calibration": list(self.options.calibration),
            **chosen,
        }


def cells_of(methods: Iterable[str], keeps: Iterable[float], options: CompressOptions) -> list[Cell]:
    """Return the cells of all methods: ours and published ones at every budget, peers once each.

    methods: default, a published one, a peer, a family of peers, or a recipe (FILE.toml). options: how to calibrate,
    sinks and window; a recipe's own are replaced by these, so that all methods see the same calibration.
    Raises OptionError for a method that is none of these.
    """
    cells: list[Cell] = []
    for method in methods:
        peers = [
            p for p in PEERS.values() if method in (p.name, p.family) or (method, p.family) == ("fp8", "fp8-unscaled")
        ]
        if peers:
            cells.extend(Cell(p.name, "peer", peer=p) for p in peers)
            continue
        kind, name, chosen = _options_of(method, options)
        for keep in keeps:
            peer = Xkv(keep, options.sinks, options.recent) if method == "xkv" else None
            cells.append(Cell(name, kind, options=replace(chosen, keep=keep), peer=peer))
    return list(dict.fromkeys(cells))


def _options_of(method: str, options: CompressOptions) -> tuple[Kind, str, CompressOptions]:
    if method in OURS:
        return "ours", method, replace(options, **OURS[method])
    if method in PUBLISHED:
        return "published", method, replace(options, **PUBLISHED[method])
    if method in OWN_FILES:
        return "published", method, replace(options, ranks_only=True)
    if method.endswith(".toml"):
        names = ("calibration", "tokens", "seq_len", "sinks", "recent", "seed")
        recipe = load_recipe(Path(method), **{n: getattr(options, n) for n in names})
        if recipe.folded:
            raise OptionError(f"{method} folds: its weights differ from the model's, so compare cannot run it.")
        return "published", Path(method).stem, recipe
    raise OptionError(
        f"method '{method}' is unknown. Choose from {', '.join(ALL_METHODS)}, {', '.join(PEERS)}, or a recipe.toml."
    )
