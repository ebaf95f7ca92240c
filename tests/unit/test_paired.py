"""Paired statistics, against figures worked out by hand."""

from __future__ import annotations

import pytest

from kvcompress.evaluate.paired import compare_paired


def test_right_and_wrong_answers_take_mcnemar() -> None:
    original, compressed = [1] * 10 + [0] * 10, [1] * 4 + [0] * 6 + [1] * 1 + [0] * 9
    result = compare_paired(original, compressed)
    assert (result.test, result.higher, result.lower, result.n) == ("mcnemar", 1, 6, 20)
    assert result.difference == pytest.approx(-5 / 20)
    assert result.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # both tails of 7 coins that show 0 or 1 heads
    mean_square = (7 / 20 - (5 / 20) ** 2) * 20 / 19
    assert result.stderr == pytest.approx((mean_square / 20) ** 0.5)


def test_log_likelihoods_take_signed_ranks() -> None:
    result = compare_paired([-1.0, -2.0, -3.0, -4.0], [-1.1, -2.2, -3.3, -4.4])
    assert (result.test, result.higher, result.lower) == ("wilcoxon", 0, 4)
    assert result.difference == pytest.approx(-0.25)
    assert result.p_value == pytest.approx(2 / 2**4)


def test_equal_results_differ_in_nothing() -> None:
    result = compare_paired([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (result.difference, result.stderr, result.p_value) == (0, 0, 1)
    assert compare_paired([0.5], [0.5]).stderr is None


def test_other_questions_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="not the same questions"):
        compare_paired([1.0, 0.0], [1.0])
