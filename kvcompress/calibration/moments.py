"""The moments of a model: the sums of every site (site_moments.py), what they are of, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.site_moments import SiteMoments, mapped
from kvcompress.checkpoint.writer import atomic_file
from kvcompress.documents import parse_json, shaped
from kvcompress.errors import CalibrationError
from kvcompress.model import blocks
from kvcompress.model.model_spec import PARTS, AttentionSpec, ModelSpec, Part, Site
from kvcompress.model.rotation import Rotation
from kvcompress.side_by_side import side_by_side

#: Of the file; part of what names it, so that files of another format are not taken for these.
MOMENTS_FORMAT = 8
_WEIGHED = ("weighed_total", "weighed_samples")


@dataclass
class Moments:
    """The moments of every site, and the protocol (text, tokens, seed, ...) that they were taken with."""

    sites: dict[Site, SiteMoments]
    protocol: dict[str, Any] = field(default_factory=dict)
    #: The windows that were added, in that order.
    order: list[int] = field(default_factory=list)
    #: Of the sites that turn with the position, as proven on the loaded model.
    rotations: dict[Site, Rotation] = field(default_factory=dict)
    #: By which the model and its relatives are known; see model.probe.signature.
    signature: tuple[float, ...] = ()
    #: Some windows of the text, [n, seq_len] token ids, int32, for what is fitted with a codec in place; None: no text.
    text: Tensor | None = None

    @property
    def n_windows(self) -> int:
        return len(self.order)

    @property
    def has_fisher(self) -> bool:
        """Whether F was measured; weights-only moments have F = I, whose unit is not nats."""
        return self.protocol.get("mode") != "weights"

    def save(self, file: Path) -> None:
        """Write the sums as safetensors, atomically."""
        from safetensors.torch import save_file

        tensors = {} if self.text is None else {"text": self.text}
        for site, moments in self.sites.items():
            tensors[f"{site}.total"] = moments.total.cpu()
            tensors[f"{site}.samples"] = moments.samples.cpu()
            for name in _WEIGHED:
                tensors[f"{site}.{name}"] = getattr(moments, name).cpu()
            if moments.coherence is not None:
                tensors[f"{site}.coherence"] = moments.coherence.cpu()
            for i, partition in enumerate(moments.partitions):
                tensors[f"{site}.partition.{i}"] = partition.to("cpu", torch.int32)
                tensors[f"{site}.outer.{i}"] = moments.outer[i].cpu()
                tensors[f"{site}.fisher.{i}"] = moments.fisher[i].cpu()
                tensors[f"{site}.weighed_outer.{i}"] = moments.weighed_outer[i].cpu()
        n_tokens = next(iter(self.sites.values())).n_tokens
        header = {"protocol": json.dumps(self.protocol), "windows": json.dumps(self.order), "n_tokens": str(n_tokens)}
        header["signature"] = json.dumps(self.signature)
        header["rotations"] = json.dumps({str(site): asdict(rotation) for site, rotation in self.rotations.items()})
        with atomic_file(file) as scratch:
            save_file(tensors, scratch, metadata=header)

    def join(self, later: Moments) -> None:
        """Add the sums of other windows, of the same blocks."""
        for site, sums in later.sites.items():
            self.sites[site].join(sums)
        self.order += later.order

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and samples, which is nearly all that is saved."""
        sums = ((*m.outer, *m.fisher, *m.weighed_outer, m.samples, m.weighed_samples) for m in self.sites.values())
        return sum(t.nbytes for own in sums for t in own)

    def weighed(self) -> Moments:
        """Return the moments of tokens that count as they were weighed; see SiteMoments.weighed."""
        return replace(self, sites={site: sums.weighed() for site, sums in self.sites.items()})

    def arrays(self) -> tuple[Any, ...]:
        """Return everything but the protocol, tensors (on the CPU) as NumPy's, for `of_arrays`."""
        sites = {site: mapped(vars(sums), lambda t: t.numpy()) for site, sums in self.sites.items()}
        return sites, self.order, self.rotations, self.signature

    @classmethod
    def of_arrays(cls, sites: Any, order: list[int], rotations: Any, signature: Any) -> Moments:
        """Return the moments of `arrays`, in memory of their own."""
        found = {site: SiteMoments(**mapped(sums, torch.tensor)) for site, sums in sites.items()}
        return cls(found, {}, order, rotations, signature)

    @staticmethod
    def order_in(file: Path) -> list[int]:
        """Return the windows that a file's moments are of, from its header. Raises CalibrationError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as handle:
                return shaped(parse_json(handle.metadata()["windows"]), list[int])
        except (SafetensorError, KeyError, ValueError, OSError, TypeError) as error:
            raise _unusable(file, error) from error

    @classmethod
    def load(cls, file: Path, *, checked: bool = True) -> Moments:
        """Return the moments saved in `file`. Raises CalibrationError if they cannot be read.

        checked: False for a file of our own that is only read: its sums stay where they are until they are needed.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as handle:
                header = handle.metadata()
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if checked:
                names = list(tensors)
                widest = max((t.shape[-1] for t in tensors.values() if t.dim()), default=1)
                copies = side_by_side(lambda name: tensors[name].clone(), names, width=widest)
                tensors = dict(zip(names, copies, strict=True))
            sites = _sites(tensors, int(header["n_tokens"]))
            turned = {name: shaped(r, Rotation) for name, r in shaped(parse_json(header["rotations"]), dict).items()}
            rotations = {site: turned[str(site)] for site in sites if str(site) in turned}
            if not sites:
                raise ValueError("it holds no site")
            if checked:
                side_by_side(lambda site: sites[site].check(site), list(sites), width=widest)
            protocol = shaped(parse_json(header["protocol"]), dict)
            order = shaped(parse_json(header["windows"]), list[int])
            signature = shaped(parse_json(header["signature"]), tuple[float, ...])
            text = tensors.get("text")
            if text is not None and (text.dtype != torch.int32 or text.dim() != 2 or bool((text < 0).any())):
                raise ValueError("its windows of text are no token ids")
            return cls(dict(sorted(sites.items())), protocol, order, rotations, signature, text)
        except (SafetensorError, KeyError, ValueError, OSError, TypeError, RuntimeError) as error:
            raise _unusable(file, error) from error


def _sites(tensors: dict[str, Tensor], n_tokens: int) -> dict[Site, SiteMoments]:
    """Return the sums of every site from the tensors of a file. Raises KeyError or ValueError."""
    sites: dict[Site, SiteMoments] = {}
    for name in tensors:
        if name.endswith(".total"):
            _, layer, part, _ = name.split(".")
            site = Site(int(layer), _part(part))
            count = sum(n.startswith(f"{site}.outer.") for n in tensors)
            sites[site] = SiteMoments(
                [tensors[f"{site}.partition.{i}"].long() for i in range(count)],
                tensors[name],
                [tensors[f"{site}.outer.{i}"] for i in range(count)],
                [tensors[f"{site}.fisher.{i}"] for i in range(count)],
                tensors[f"{site}.samples"],
                n_tokens,
                tensors.get(f"{site}.coherence"),
                weighed_outer=[tensors[f"{site}.weighed_outer.{i}"] for i in range(count)],
                **{name: tensors[f"{site}.{name}"] for name in _WEIGHED},
            )
    return sites


def _unusable(file: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"{file} holds no usable moments ({error}). Remove it to calibrate again.")


def _part(name: str) -> Part:
    if name not in PARTS:
        raise ValueError(f"'{name[:20]}' is neither key nor value")
    return "key" if name == "key" else "value"


def usable_partitions(attention: AttentionSpec, group: int, band: int) -> list[Tensor]:
    """Return the blocks worth keeping moments for: everything at once, or groups of heads and bands of channels.

    Each basis takes its blocks out of one of these: `latent` and `per_head` from the groups, `band`, `frequency`,
    `head` and `share` from the bands.
    """
    groups = blocks.head_groups(attention, group)
    return [groups] if group == attention.n_kv_heads else [groups, blocks.bands(attention, band)]


def empty_moments(
    spec: ModelSpec, protocol: dict[str, Any], *, group: int, band: int = 16, device: str | torch.device = "cpu"
) -> Moments:
    """Return moments of zero tokens for every site, kept for blocks of `group` KV heads and of `band` channels."""
    sites = {}
    for site in spec.sites:
        attention = spec.attention(site)
        partitions = usable_partitions(attention, group, min(band, attention.head_dim))
        sites[site] = SiteMoments.empty(partitions, attention.width, device)
    return Moments(sites, protocol)
