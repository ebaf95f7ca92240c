"""Distillation: KL from the uncompressed model's next-token distribution to that with the compressed cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kvcompress.heal.attention import Switch
from kvcompress.heal.layers import TrainableLayer
from kvcompress.heal.options import HealOptions
from kvcompress.runtime.head_norm import HeadNorm

#: Logits alive at once, in both models: 600 MB of float32.
_LOGITS = 1024 * 150_000
#: Columns of what `Distillation` returns outside of training.
FIGURES = ("nll_original", "nll_healed", "kl", "agreement")


class Distillation(nn.Module):
    """A student with trainable maps (and weights) beside its teacher; what the Trainer trains.

    The teacher, and a student whose weights stay as they are, are no submodules: they are neither saved nor
    synchronised. Where both are one model, the switch tells which of them runs.
    """

    #: What checkpoints do not hold: the Trainer warns of anything else that is missing in them.
    _keys_to_ignore_on_save: list[str] | None

    def __init__(
        self,
        student: Any,
        teacher: Any,
        layers: list[TrainableLayer],
        switch: Switch,
        options: HealOptions,
        *,
        trained: list[str],
        new_norms: list[HeadNorm],
    ) -> None:
        """trained: names of the student's parameters that are trained beside the layers' maps; new_norms: those among
        its modules that the compressed model did not have."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._models = (student, teacher)
        self.switch, self.options = switch, options
        self._new_norms = new_norms
        for model in {id(m): m for m in self._models}.values():
            model.requires_grad_(False)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # the teacher has none, and what is distilled is not a matter of chance
        if trained:
            self.student = student
            wanted = set(trained)
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(name in wanted)
        saved = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self._keys_to_ignore_on_save = [name for name in self.state_dict() if name not in saved] or None
        self.register_state_dict_post_hook(_only_trained)

    def tie_weights(self) -> None:
        """Do nothing: weights are tied already; called by the Trainer after it has loaded a checkpoint."""

    @property
    def student_model(self) -> Any:
        return self._models[0]

    @contextmanager
    def without_new_norms(self) -> Iterator[None]:
        """Within the block the student is what it was before anything was added."""
        for norm in self._new_norms:
            norm.passes_through = True
        try:
            yield
        finally:
            for norm in self._new_norms:
                norm.passes_through = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the student's layers in the backward pass; called by the Trainer."""
        settings = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        self.student_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """input_ids: [batch, seq_len] -> {"loss"}: the mean over predicted tokens, in nats; in training.

        Otherwise {"figures"}: float64 [4], sums over the predicted tokens, named by FIGURES.
        """
        # windows of other numbers than the training's are measured too seldom to compile layers for them
        with torch.compiler.set_stance("default" if self.training else "force_eager"):
            goal = self._goal(input_ids)
            self.student_model.train(self.training)
            states = _states(self.student_model, input_ids)
        labels = input_ids[:, 1:].flatten()
        if not self.training:
            assert goal is not None
            return {"figures": self._figures(states, goal, labels)}
        return {"loss": self._loss(states, labels, goal)}

    def _goal(self, input_ids: Tensor) -> Tensor | None:
        """Return the teacher's states; None in a training on the text's own loss alone, which does not ask for them."""
        if self.training and not (self.options.kl_loss or self.options.hidden_loss):
            return None
        with torch.no_grad(), self.switch.off():
            return _states(self._models[1], input_ids)

    def _loss(self, states: Tensor, labels: Tensor, goal: Tensor | None) -> Tensor:
        """Return the mean over rows of all losses, by their weights."""
        options, loss = self.options, torch.zeros((), device=states.device)
        if options.kl_loss or options.text_loss:
            for rows in self._in_parts(states, labels, *([] if goal is None else [goal])):
                loss = loss + checkpoint(self._loss_of_rows, *rows, use_reentrant=False)
            loss = loss / len(labels)
        if options.hidden_loss and goal is not None:
            scale = goal.float().square().mean().clamp_min(1e-12)
            loss = loss + options.hidden_loss * (states.float() - goal.float()).square().mean() / scale
        return loss

    def _in_parts(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield tensors of as many rows each, cut where the logits of more rows would not fit."""
        at_once = max(1, _LOGITS // self.student_model.config.get_text_config().vocab_size)
        return zip(*(tensor.split(at_once) for tensor in rows), strict=True)

    def _loss_of_rows(self, states: Tensor, labels: Tensor, goal: Tensor | None = None) -> Tensor:
        """Return the sum over rows of KL(teacher || student) and of the text's own loss, by their weights."""
        student, teacher = self._models
        logits, options = student.lm_head(states), self.options
        if goal is None or not options.kl_loss:
            return options.text_loss * functional.cross_entropy(logits.float(), labels, reduction="sum")
        with torch.no_grad():
            wanted = teacher.lm_head(goal)
        return divergence(logits, wanted, labels, kl_loss=options.kl_loss, text_loss=options.text_loss)

    def _figures(self, states: Tensor, goal: Tensor, labels: Tensor) -> Tensor:
        student, teacher = self._models
        sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=states.device)
        for rows, wanted, label in self._in_parts(states, goal, labels):
            p = teacher.lm_head(wanted).float().log_softmax(-1)
            q = student.lm_head(rows).float().log_softmax(-1)
            sums += torch.stack(
                [
                    functional.nll_loss(p, label, reduction="sum").double(),
                    functional.nll_loss(q, label, reduction="sum").double(),
                    functional.kl_div(q, p, log_target=True, reduction="sum").double(),
                    (p.argmax(-1) == q.argmax(-1)).sum().double(),
                ]
            )
        return sums


def _states(model: Any, input_ids: Tensor) -> Tensor:
    """Return a model's final hidden states of all tokens that predict another: [batch * (seq_len - 1), d_model]."""
    states: Tensor = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1)


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, *, kl_loss: float, text_loss: float) -> Tensor:
    """Return kl_loss * KL(teacher || student) + text_loss * the labels' negative log-likelihood by the student.

    student, teacher: logits [rows, n]; labels: [rows]. A sum over rows, float32; on a GPU by one kernel.
    """
    if student.is_cuda:
        from kvcompress.kernels.divergence import Divergence  # Triton comes with torch's builds for GPUs alone

        summed: Tensor = Divergence.apply(student, teacher, labels, kl_loss, text_loss)
        return summed
    q, p = (logits.float().log_softmax(-1) for logits in (student, teacher))
    loss = kl_loss * functional.kl_div(q, p, log_target=True, reduction="sum")
    return loss + text_loss * functional.nll_loss(q, labels, reduction="sum") if text_loss else loss


def _only_trained(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave only trained parameters in a state dict: the rest is as it was, and tied weights would be there twice."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [n for n in state if n.startswith(prefix) and n not in trained]:
        del state[name]
