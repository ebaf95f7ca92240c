"""Is the difference real? Paired statistics of two models' results on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, slots=True)
class Paired:
    """Compressed minus original: the mean difference over questions, its standard error, and a p-value.

    test: "mcnemar" (exact, for right or wrong answers) or "wilcoxon" (signed ranks). higher, lower: on how many
    questions the compressed model has the higher, and the lower, result. p_value: of no difference.
    """

    difference: float
    stderr: float | None
    p_value: float
    test: str
    higher: int
    lower: int
    n: int


def compare_paired(original: Sequence[float], compressed: Sequence[float]) -> Paired:
    """Return the paired comparison of two models' results on the same questions, in the same order."""
    a, b = np.asarray(original, dtype=np.float64), np.asarray(compressed, dtype=np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.size} results of the original, {b.size} of the compressed model: not the same questions")
    d = b - a
    higher, lower = int((d > 0).sum()), int((d < 0).sum())
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    if higher + lower == 0:
        p_value = 1.0
    elif binary:  # McNemar's test, exact: with no difference, a changed answer is right or wrong with equal chance
        p_value = float(stats.binomtest(higher, higher + lower).pvalue)
    else:
        p_value = float(stats.wilcoxon(d).pvalue)
    stderr = float(d.std(ddof=1) / np.sqrt(d.size)) if d.size > 1 else None
    return Paired(float(d.mean()), stderr, p_value, "mcnemar" if binary else "wilcoxon", higher, lower, d.size)
