"""Every site's fitted basis: all held in memory, or each fitted anew when it is asked for, where all are too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from kvcompress.bases import Basis
from kvcompress.calibration.memory import free_bytes
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.choose.fitting import FittedSite, fit_site, fitted_basis, key_basis, value_basis, with_true_energy
from kvcompress.model.model_spec import AttentionSpec, Part, Site
from kvcompress.options import GROUPED, CompressOptions
from kvcompress.side_by_side import side_by_side

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

Progress = Callable[[str, int, int], None]
#: Matrices of float64 that a fit holds for each block: its moments, encoder and decoder, and what is made of them.
_MATRICES = 6
#: Fits may take this share of the free memory; where they would take more, they are not held together.
_HELD_SHARE = 0.25


class Fits(Mapping[Site, FittedSite]):
    """The fits of a checkpoint's sites, each made when it is asked for."""

    def __init__(
        self, checkpoint: Checkpoint, moments: Moments, options: CompressOptions, *, device: str = "cpu"
    ) -> None:
        """device: where this process computes large products."""
        self._device = device
        self._spec, self._moments, self._options = checkpoint.spec, moments, options
        self._bases = {"key": key_basis(checkpoint, options), "value": value_basis(checkpoint, options)}
        self._at_hand = lru_cache(maxsize=1)(self._fit)

    def __getitem__(self, site: Site) -> FittedSite:
        return self._at_hand(site)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._spec.sites)

    def __len__(self) -> int:
        return len(self._spec.sites)

    @property
    def nbytes(self) -> int:
        """About how many bytes all fits together take."""
        blocks = [self._bases[site.part].blocks(self._spec.attention(site)) for site in self]
        return sum(_MATRICES * 8 * b.shape[0] * b.shape[1] ** 2 for b in blocks)

    def held(self, progress: Progress | None = None, workers: Workers | None = None) -> dict[Site, FittedSite]:
        """Return all of them in memory; workers: who fits them, threads of this process by default."""
        sites, found = list(self), dict[Site, FittedSite]()
        told = progress or (lambda *_: None)
        done = lambda n: told("fit", n, len(sites))  # noqa: E731
        if workers is None:
            return dict(zip(sites, self._side_by_side(sites, done), strict=True))
        for index, fit in workers.each(fit_of, [self._arguments(site) for site in sites]):
            found[sites[index]] = fit
            done(len(found))
        return {site: found[site] for site in sites}

    def _side_by_side(self, sites: Sequence[Site], done: Callable[[int], None]) -> list[FittedSite]:
        """Return the fits of sites by threads; a GPU's products are left to the few that it takes handles for."""
        width = max(self._spec.width(site) for site in sites)
        if self._device == "cpu":
            return side_by_side(self._fit, sites, width=width, done=done)
        made = side_by_side(lambda site: fitted_basis(*self._arguments(site)), sites, width=width, done=done)
        weighed = partial(with_true_energy, options=self._options, device=self._device)
        return side_by_side(weighed, made, width=width, device=self._device)

    def _fit(self, site: Site) -> FittedSite:
        return fit_site(*self._arguments(site), device=self._device)

    def _arguments(self, site: Site) -> tuple[Basis, SiteMoments, AttentionSpec, Part, CompressOptions]:
        basis = self._bases[site.part]
        return basis, self._moments.sites[site], self._spec.attention(site), site.part, self._options


def fit_of(
    basis: Basis,
    moments: SiteMoments,
    attention: AttentionSpec,
    part: Part,
    options: CompressOptions,
    _device: str = "cpu",
) -> FittedSite:
    """Return the fit of a site, as a task of anybody's: moments are on the CPU, and so is the fit."""
    return fit_site(basis, moments, attention, part, options)


@contextmanager
def room_where_needed(
    checkpoint: Checkpoint, moments: Moments, options: CompressOptions, scratch: Path
) -> Iterator[Path | None]:
    """Yield a directory in `scratch` where all fits together would take much of the memory, None elsewhere."""
    free = free_bytes("cpu")
    if free is None or options.key_basis == GROUPED or Fits(checkpoint, moments, options).nbytes < free * _HELD_SHARE:
        yield None
        return
    with TemporaryDirectory(prefix=".maps-", dir=scratch) as room:
        yield Path(room)
