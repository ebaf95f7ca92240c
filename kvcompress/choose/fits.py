"""Every site's fitted basis: all held in memory, or each fitted anew when it is asked for, where all are too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from kvcompress.bases import Basis
from kvcompress.calibration.memory import allocatable, free_bytes, limited
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.choose.fitting import FittedSite, fit_site, fitted_basis, key_basis, value_basis, with_true_energy
from kvcompress.model.model_spec import AttentionSpec, Part, Site
from kvcompress.options import GROUPED, CompressOptions
from kvcompress.side_by_side import fitting_device, side_by_side

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

Progress = Callable[[str, int, int], None]
#: Those of `fit_site`.
Arguments = tuple[Basis, SiteMoments, AttentionSpec, Part, CompressOptions]
#: Matrices of float64 that a fit holds for each block: its moments, encoder and decoder, and what is made of them.
_MATRICES = 6
#: Fits may take this share of the free memory; where they would take more, they are not held together.
_HELD_SHARE = 0.25
#: Sites of a task at most: what is fitted again where a worker dies.
_MOST_SITES = 16


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

    def held(
        self, progress: Progress | None = None, workers: Workers | None = None, *, memory: int | None = None
    ) -> dict[Site, FittedSite]:
        """Return all of them in memory; workers: who fits them, threads of this process by default.

        memory: bytes that a worker may take of its device, None for what is free there.
        """
        sites, found = list(self), dict[Site, FittedSite]()
        width = max(self._spec.width(site) for site in sites)
        told = progress or (lambda *_: None)
        done = lambda n: told("fit", n, len(sites))  # noqa: E731
        if workers is None:
            given = [self._arguments(site) for site in sites]
            made = _fitted_side_by_side(given, width=width, device=self._device, done=done)
            return dict(zip(sites, made, strict=True))
        from kvcompress.calibration.pieces import pieces_of  # here: with all that runs a model, as workers have it

        pieces = pieces_of(range(len(sites)), workers.n, _MOST_SITES)
        given_out = [([self._light(sites[i]) for i in piece], width, memory) for piece in pieces]
        for index, fits in workers.each(fits_of, given_out):
            found |= zip((sites[i] for i in pieces[index]), fits, strict=True)
            done(len(found))
        return {site: found[site] for site in sites}

    def _fit(self, site: Site) -> FittedSite:
        return fit_site(*self._arguments(site), device=self._device)

    def _arguments(self, site: Site) -> Arguments:
        basis = self._bases[site.part]
        return basis, self._moments.sites[site], self._spec.attention(site), site.part, self._options

    def _light(self, site: Site) -> Arguments:
        """Return the arguments to be sent: a fit looks at no samples, which are half of what moments weigh."""
        basis, sums, *how = self._arguments(site)
        return basis, replace(sums, samples=torch.zeros(0, sums.total.numel()), typical=None), *how  # type: ignore[return-value]


def fits_of(given: Sequence[Arguments], width: int, memory: int | None, device: str) -> list[FittedSite]:
    """Return the fits of sites, as a task of anybody's, where and as one process computes them.

    given: the arguments of `fit_site` for each; moments are on the CPU, and so are the fits. width: that of the
    model's widest site. memory: bytes that this process may take of the device, None for what is free.
    """
    device = fitting_device(device, width, None if memory is None else allocatable(memory, solves=True))
    with limited(device, memory, solves=True):
        return _fitted_side_by_side(given, width=width, device=device)


def _fitted_side_by_side(
    given: Sequence[Arguments], *, width: int, device: str, done: Callable[[int], None] | None = None
) -> list[FittedSite]:
    """Return the fits of sites by threads; a GPU's products are left to the few that it takes handles for."""
    if device == "cpu":
        return side_by_side(lambda one: fit_site(*one), given, width=width, done=done)
    made = side_by_side(lambda one: fitted_basis(*one), given, width=width, done=done)
    weighed = partial(with_true_energy, options=given[0][-1], device=device)
    return side_by_side(weighed, made, width=width, device=device)


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
