"""Mixtures of calibration texts: shares, windows, and what is held out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.calibration.builtin import BUNDLED, bundled_documents, bundled_text
from kvcompress.calibration.mixture import (
    DEFAULT_CALIBRATION,
    fair_shares,
    held_out_windows,
    mixed_windows,
    window_shares,
)
from kvcompress.calibration.text import CODE, PROSE, SELF, all_windows
from kvcompress.errors import CalibrationError


class Letters:
    """A tokenizer of one token a character, so that windows can be read."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def write(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.fixture
def letters(tmp_path: Path) -> tuple[str, ...]:
    return tuple(write(tmp_path / f"{c}.txt", c * 400) for c in "abc")


def mixed(sources: tuple[str, ...], n_tokens: int, seq_len: int) -> Any:
    return mixed_windows(Letters(), window_shares(Letters(), sources, n_tokens, seq_len), seq_len)


@pytest.mark.parametrize(("n_windows", "counts"), [(9, [3, 3, 3]), (8, [3, 3, 2]), (3, [1, 1, 1]), (2, [1, 1, 0])])
def test_mixtures_are_equal_parts(letters: tuple[str, ...], n_windows: int, counts: list[int]) -> None:
    first = [chr(w[0]) for w in mixed(letters, 4 * n_windows, 4).ids.tolist()]
    assert [first.count(c) for c in "abc"] == counts
    assert first[:3] == sorted(set(first))  # interleaved, so that an interrupted pass has seen all of them


def test_a_part_of_a_window_is_left_out(letters: tuple[str, ...]) -> None:
    assert mixed(letters, 4 * 5 + 3, 4).ids.shape == (5, 4)


def test_fewer_tokens_than_a_window_still_give_one(letters: tuple[str, ...]) -> None:
    assert mixed(letters, 1, 16).ids.shape == (1, 16)


def test_a_source_named_twice_is_one(letters: tuple[str, ...]) -> None:
    assert window_shares(Letters(), (letters[0], letters[0], letters[1]), 40, 4) == {letters[0]: 5, letters[1]: 5}


def test_mixtures_take_sampled_text(letters: tuple[str, ...]) -> None:
    sampled = torch.full((5, 4), ord("s"))
    windows = mixed_windows(Letters(), {letters[0]: 2, SELF: 2}, 4, sampled=lambda n: sampled[:n])
    assert [chr(w[0]) for w in windows.ids.tolist()] == ["a", "s", "a", "s"]


def test_mixtures_are_named_by_their_tokens(letters: tuple[str, ...]) -> None:
    windows = mixed(letters, 36, 4)
    assert windows.sha256 == hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest()
    assert windows.sha256 != mixed(letters[:2], 36, 4).sha256


def test_one_source_with_too_little_text_is_named(letters: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"short\.txt has fewer than the 8 tokens"):
        mixed((*letters, write(tmp_path / "short.txt", "x")), 36, 4)


def test_the_default_knows_all_kinds_and_samples_an_eighth() -> None:
    shares = window_shares(Letters(), (), 65536, 2048)
    assert tuple(shares) == DEFAULT_CALIBRATION and sum(shares.values()) == 32
    assert shares[SELF] == 4
    assert min(shares[s] for s in (*BUNDLED, PROSE, CODE)) >= 3


def test_a_short_default_samples_nothing() -> None:
    shares = window_shares(Letters(), (), 7 * 2048, 2048)
    assert shares[SELF] == 0 and set(shares.values()) == {0, 1}


def test_a_long_default_is_made_up_by_what_comes_with_python() -> None:
    """A million tokens: bundled texts give what they have but a window, prose and code the rest in equal parts."""
    shares = window_shares(Letters(), (), 1 << 20, 2048)
    assert sum(shares.values()) == 512 and shares[SELF] == 64
    for source in BUNDLED:
        n_chars = len("\0".join(bundled_documents(source))) + 1
        assert shares[source] == n_chars // 2048 - 1
    assert abs(shares[PROSE] - shares[CODE]) <= 1


def test_bundled_texts_alone_may_have_too_little() -> None:
    with pytest.raises(CalibrationError, match=r"builtin:notes has 8 windows .* 100 are needed"):
        window_shares(Letters(), ("builtin:notes",), 100 * 2048, 2048)


def test_bundled_texts_are_clean() -> None:
    for source in BUNDLED:
        text = bundled_text(source)
        assert "gutenberg" not in text.lower() and "\r" not in text
        assert all(len(passage) > 1500 for passage in bundled_documents(source))


def test_an_unknown_bundled_text_is_no_data_set() -> None:
    with pytest.raises(CalibrationError, match=r"builtin:poems does not exist\. Choose from builtin:essays, "):
        mixed(("builtin:poems",), 64, 4)


@pytest.mark.parametrize(("source", "share"), [("builtin:notes", 3), (PROSE, 4), (CODE, 0)])
def test_held_out_windows_were_not_calibrated_on(source: str, share: int) -> None:
    held_out = held_out_windows(Letters(), source, share, 2, 256)
    assert held_out.shape == (2, 256) and not torch.equal(held_out[0], held_out[1])
    if share:
        taken = mixed_windows(Letters(), {source: share}, 256).ids
        assert not any(torch.equal(a, b) for a in taken for b in held_out)
    assert all(any(torch.equal(w, h) for w in all_windows(Letters(), source, share + 2, 256)) for h in held_out)


def test_nothing_is_held_out_of_a_text_that_was_used_up(letters: tuple[str, ...]) -> None:
    assert held_out_windows(Letters(), letters[0], 100, 2, 4).shape == (0, 4)
    assert held_out_windows(Letters(), letters[0], 99, 2, 4).shape == (1, 4)


@given(n=st.integers(0, 300), limits=st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_shares_are_fair(n: int, limits: list[int]) -> None:
    n = min(n, sum(limits))
    shares = fair_shares(n, limits)
    assert sum(shares) == n and all(s <= limit for s, limit in zip(shares, limits, strict=True))
    still_open = [s for s, limit in zip(shares, limits, strict=True) if s < limit]
    assert all(max(shares) - s <= 1 for s in still_open)
