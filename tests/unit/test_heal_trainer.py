"""How a training's windows are shared out over processes, and the score by which its best weights are chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kvcompress.errors import OptionError
from kvcompress.heal.options import TRAINED, HealOptions
from kvcompress.heal.trainer import HealingTrainer, _share_out


@pytest.mark.parametrize(
    ("batch", "device_batch", "n_processes", "at_once", "times"),
    [(8, 8, 1, 8, 1), (8, 8, 2, 4, 1), (12, 8, 1, 6, 2), (32, 8, 2, 8, 2), (7, 4, 1, 1, 7)],
)
def test_a_step_has_the_windows_that_were_asked_for(
    batch: int, device_batch: int, n_processes: int, at_once: int, times: int
) -> None:
    arguments: Any = SimpleNamespace(world_size=n_processes, n_gpu=4)
    _share_out(arguments, HealOptions(batch=batch, device_batch=device_batch))
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (at_once, times)
    assert at_once * times * n_processes == batch


def test_windows_that_cannot_be_shared_out_are_named() -> None:
    arguments: Any = SimpleNamespace(world_size=2)
    with pytest.raises(OptionError, match="batch 5 cannot be shared out over 2 processes"):
        _share_out(arguments, HealOptions(batch=5))


@pytest.mark.parametrize(
    ("after", "score"),
    [({"a": 0.5, "b": 1.0}, 0.5), ({"a": 1.0, "b": 2.0}, 1.0), ({"a": 0.1, "b": 2.2}, 0.6 + 1)],
    ids=["half of before", "as before", "better in the mean, worse on one"],
)
def test_no_mean_is_good_where_one_text_is_worse(after: dict[str, float], score: float) -> None:
    trainer: Any = SimpleNamespace(before={"a": {"kl": 1.0}, "b": {"kl": 2.0}})
    assert HealingTrainer.score(trainer, {text: {"kl": kl} for text, kl in after.items()}) == pytest.approx(score)


@pytest.mark.parametrize("train", TRAINED)
def test_whatever_is_trained_has_a_rate(train: str) -> None:
    model = nn.ParameterDict({"step_change": torch.zeros(2), "head_norm": torch.ones(2), "v_proj": torch.ones(2, 2)})
    device = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(optimizer=None, model_options=HealOptions(train=train), args=device)
    groups = HealingTrainer.create_optimizer(trainer, model).param_groups
    assert [group["lr"] for group in groups] == [0.01, 5e-4, 5e-4]
