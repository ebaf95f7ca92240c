"""The moments of a site: mean m, covariance C and Fisher information F, kept as float64 sums of blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.leverage import spread_over
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
class SiteMoments:
    """Sums over tokens at one site.

    `partitions` are the stored blocks ([n_blocks, width] each); `outer` holds sum x x^T and `fisher` sum g g^T
    for each of them ([n_blocks, width, width], float64); `total` is sum x ([n], float64). `samples` are some of the
    tokens themselves ([n_samples, n], float32), for what moments cannot tell: the shape of each component's
    distribution, to which its quantiser is fitted. `coherence` ([n], float64, the component that costs most to drop
    first) is how much more dropping one costs than its tokens do one by one (coherence.py); None: not measured.

    `weighed_total`, `weighed_outer` and `weighed_samples` are the same of tokens that count as they were weighed
    (leverage.py), 1 in the mean; zero and empty where they were not.
    """

    partitions: list[Tensor]
    total: Tensor
    outer: list[Tensor]
    fisher: list[Tensor]
    samples: Tensor
    n_tokens: int = 0
    coherence: Tensor | None = None
    weighed_total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    weighed_outer: list[Tensor] = field(default_factory=list)
    weighed_samples: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    #: Tokens evenly spread, [n, width], where `samples` are others.
    typical: Tensor | None = None

    @classmethod
    def empty(cls, partitions: list[Tensor], width: int, device: str | torch.device = "cpu") -> SiteMoments:
        def zeros() -> list[Tensor]:
            shapes = ((p.shape[0], p.shape[1], p.shape[1]) for p in partitions)
            return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

        total, samples = torch.zeros(width, dtype=torch.float64, device=device), torch.zeros(0, width, device=device)
        return cls(
            [p.to(device) for p in partitions],
            total,
            zeros(),
            zeros(),
            samples,
            weighed_total=total.clone(),
            weighed_outer=zeros(),
            weighed_samples=samples.clone(),
        )

    def add(
        self, x: Tensor, g: Tensor, weight: Tensor | None = None, *, n_samples: int = 0, n_weighed: int = 0
    ) -> None:
        """Add tokens: x, g [n_tokens, n], any dtype; `n_samples` of them, evenly spread, are kept as samples.

        weight: [n_tokens], float64, how much each counts, 1 in the mean; None where they are not weighed. n_weighed: so
        many are kept as weighed samples, evenly spread over the sum of weights: a token may come twice.
        """
        if n_samples:
            chosen = torch.linspace(0, len(x) - 1, min(n_samples, len(x)), device=x.device).round().long()
            self.samples = torch.cat([self.samples, x[chosen].float()])
        if n_weighed and weight is not None:
            chosen = spread_over(weight, min(n_weighed, len(x)))
            self.weighed_samples = torch.cat([self.weighed_samples, x[chosen].float()])
        x, g = x.double(), g.double()
        self.total += x.sum(0)
        added = [(self.outer, x), (self.fisher, g)]
        if weight is not None:
            self.weighed_total += weight @ x
            added.append((self.weighed_outer, weight.sqrt()[:, None] * x))
        for stored, rows in added:
            for partition, sums in zip(self.partitions, stored, strict=True):
                block_rows = rows[:, partition].transpose(0, 1)  # [n_blocks, n_tokens, width]
                sums.baddbmm_(block_rows.transpose(1, 2), block_rows)
        self.n_tokens += x.shape[0]

    def join(self, *later: SiteMoments) -> None:
        """Add the sums of later windows, of the same blocks."""
        for other in later:
            for sums, more in zip(self._sums, other._sums, strict=True):
                sums += more
            self.n_tokens += other.n_tokens
        self.samples = torch.cat([self.samples, *(other.samples for other in later)])
        self.weighed_samples = torch.cat([self.weighed_samples, *(other.weighed_samples for other in later)])

    @property
    def _sums(self) -> tuple[Tensor, ...]:
        return self.total, *self.outer, *self.fisher, self.weighed_total, *self.weighed_outer

    def weighed(self) -> SiteMoments:
        """Return the moments with C, the mean and the samples of tokens that count as they were weighed; F stays.

        Moments without such samples are returned as they are. What is returned shares its tensors.
        """
        if not len(self.weighed_samples):
            return self
        return SiteMoments(
            self.partitions,
            self.weighed_total,
            self.weighed_outer,
            self.fisher,
            self.weighed_samples,
            self.n_tokens,
            self.coherence,
            typical=self.samples,
        )

    @property
    def mean(self) -> Tensor:
        """m: [n], float64."""
        return self.total / self.n_tokens

    def covariance(self, wanted: Tensor, *, centred: bool, device: str = "cpu") -> Tensor:
        """Return C for blocks [n_blocks, width] -> [n_blocks, width, width]: about the mean, or about zero.

        wanted: on the CPU, as the moments are; device: where it is computed.
        """
        second = self._select(self.outer, wanted, device) / self.n_tokens
        if centred:
            mean = self.mean[wanted].to(device)
            second = second - mean.unsqueeze(2) * mean.unsqueeze(1)
        return second

    def fisher_information(self, wanted: Tensor) -> Tensor:
        """Return F = E[g g^T] for blocks [n_blocks, width] -> [n_blocks, width, width]."""
        return self._select(self.fisher, wanted, "cpu") / self.n_tokens

    def partition_with(self, wanted: Tensor) -> Tensor:
        """Return the stored blocks that contain the wanted ones. Raises CalibrationError if there are none."""
        return self.partitions[self._find(wanted)[0]]

    def _select(self, stored: list[Tensor], wanted: Tensor, device: str) -> Tensor:
        index, *places = self._find(wanted)
        block, place = (p.to(device) for p in places)
        return stored[index].to(device)[block.unsqueeze(2), place.unsqueeze(2), place.unsqueeze(1)]

    def _find(self, wanted: Tensor) -> tuple[int, Tensor, Tensor]:
        """Return (stored partition, block of each wanted one [n_blocks, 1], places in it [n_blocks, width])."""
        for index, partition in enumerate(self.partitions):
            places = torch.empty(2, self.total.numel(), dtype=torch.long)
            for b, row in enumerate(partition):
                places[0, row], places[1, row] = b, torch.arange(row.numel())
            block, place = places[0][wanted], places[1][wanted]
            if bool((block == block[:, :1]).all()):
                return index, block[:, :1], place
        raise CalibrationError(
            "the saved moments do not hold the blocks of this basis (they were left out to save memory). "
            "Choose a smaller group or band, or remove the saved moments to calibrate again."
        )

    def check(self, site: Site) -> None:
        """Raise ValueError where sums that were read from a file do not fit together."""
        n = self.total.numel()
        if self.total.shape != (n,) or self.samples.dim() != 2 or self.samples.shape[1] != n or self.n_tokens < 1:
            raise ValueError(f"the sums of {site} are of {n} numbers and {self.n_tokens} tokens, its samples not")
        if not self.partitions:
            raise ValueError(f"{site} has no blocks")
        for partition, outer, fisher in zip(self.partitions, self.outer, self.fisher, strict=True):
            if partition.dim() != 2 or not torch.equal(partition.flatten().sort()[0], torch.arange(n)):
                raise ValueError(f"the blocks of {site} are no partition")
            shape = (*partition.shape, partition.shape[1])
            if outer.shape != shape or fisher.shape != shape:
                raise ValueError(f"the sums of {site} have shape {list(outer.shape)}, its blocks {list(shape)}")
        if [t.shape for t in self.weighed_outer] != [t.shape for t in self.outer]:
            raise ValueError(f"the weighed sums of {site} are not of its blocks")
        if self.weighed_total.shape != (n,) or self.weighed_samples.shape[1:] != (n,):
            raise ValueError(f"the weighed sums of {site} are not of {n} numbers")
        sums = (*self._sums, *([] if self.coherence is None else [self.coherence]))
        if self.coherence is not None and (self.coherence.shape != (n,) or bool((self.coherence < 1).any())):
            raise ValueError(f"the coherence of {site} is no {n} numbers from 1 on")
        samples = self.samples, self.weighed_samples
        finite = all(bool(t.isfinite().all()) for t in (*sums, *samples))
        if any(t.dtype != torch.float32 for t in samples) or not finite or any(t.dtype != torch.float64 for t in sums):
            raise ValueError(f"the sums of {site} are no finite float64 numbers, or its samples no float32")

    def to(self, device: str) -> SiteMoments:
        return SiteMoments(**_mapped(vars(self), lambda t: t.to(device)))


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
        sites = {site: _mapped(vars(sums), lambda t: t.numpy()) for site, sums in self.sites.items()}
        return sites, self.order, self.rotations, self.signature

    @classmethod
    def of_arrays(cls, sites: Any, order: list[int], rotations: Any, signature: Any) -> Moments:
        """Return the moments of `arrays`, in memory of their own."""
        found = {site: SiteMoments(**_mapped(sums, torch.tensor)) for site, sums in sites.items()}
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


def _mapped(fields: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a site's fields, each tensor or array changed, lists of them, too."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [change(t) for t in value]
        return value if value is None or isinstance(value, int) else change(value)

    return {name: changed(value) for name, value in fields.items()}


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
