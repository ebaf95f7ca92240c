"""Tensors that grow by a share: what they hold, how often they are copied, and what their room costs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.runtime.growing import GROWTH, GrowingTensor, Grown, append


class Holder:
    rows = Grown(1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.sampled_from([0, 1, 2]), st.sampled_from([1, 8]))
def test_holds_what_cat_would_hold(lengths: list[int], dim: int, step: int) -> None:
    size = [2, 3, 4]
    parts = []
    for i, n in enumerate(lengths):
        size[dim] = n
        parts.append(torch.full(size, float(i)))
    growing = GrowingTensor(parts[0], dim)
    for part in parts[1:]:
        growing.append(part, step=step)
    whole = torch.cat(parts, dim)
    assert torch.equal(growing.filled, whole)
    assert growing.room_bytes <= whole.numel() * 4 / GROWTH
    assert growing.filled.untyped_storage().nbytes() == whole.numel() * 4 + growing.room_bytes


def test_a_long_one_is_copied_once_in_an_eighth_of_its_length() -> None:
    growing = GrowingTensor(torch.zeros(1, 1000, 2), 1)
    places = set()
    for _ in range(1000):
        growing.append(torch.ones(1, 1, 2))
        places.add(growing.filled.data_ptr())
    assert len(places) <= 7  # 1.125 ** 6 > 2
    assert growing.filled[0, :, 0].tolist() == [0.0] * 1000 + [1.0] * 1000


def test_a_short_one_has_no_room() -> None:
    growing = GrowingTensor(torch.zeros(1, 10, 2), 1)
    for _ in range(200):
        growing.append(torch.zeros(1, 1, 2), step=32)
        assert growing.room_bytes == 0


def test_an_attribute_is_none_a_tensor_or_its_filled_part() -> None:
    holder = Holder()
    assert holder.rows is None
    first = torch.arange(80.0).view(1, 40, 2)
    append(holder, Holder.rows, first)
    assert holder.rows is first
    append(holder, Holder.rows, first[:, :3])
    assert torch.equal(holder.rows, torch.cat([first, first[:, :3]], 1))
    growing = Holder.rows.growing(holder)
    assert growing is not None and growing.room_bytes == 5 * 2 * 4
    holder.rows = holder.rows[:, :2].clone()
    assert holder.rows.untyped_storage().nbytes() == 2 * 2 * 4
    holder.rows = None
    assert holder.rows is None


def test_gradients_flow_through_what_was_appended() -> None:
    holder, leaf = Holder(), torch.ones(1, 2, 2, requires_grad=True)
    append(holder, Holder.rows, torch.zeros(1, 40, 2))
    append(holder, Holder.rows, 2 * leaf)
    append(holder, Holder.rows, 3 * leaf)
    holder.rows.sum().backward()
    assert torch.equal(leaf.grad, torch.full((1, 2, 2), 5.0))
