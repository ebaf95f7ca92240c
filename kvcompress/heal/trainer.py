"""The training itself: transformers' Trainer with our optimiser groups, held-out loss and progress.

What transformers may rename of its Trainer is named here alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kvcompress.errors import OptionError
from kvcompress.heal.distil import FIGURES, Distillation
from kvcompress.heal.options import HealOptions
from kvcompress.heal.texts import HealTexts


@dataclass(frozen=True, slots=True)
class HealProgress:
    """What is reported as training goes on: tokens seen, of all devices, and how fast; losses in nats.

    loss: mean training loss since the last report, None before the first. held_out: KL of every source, where it was
    measured just now; `score` is then their mean relative to before, see `HealingTrainer`.
    """

    tokens: int
    tokens_in_all: int
    tokens_per_second: float
    loss: float | None = None
    held_out: dict[str, float] | None = None
    score: float | None = None


Report = Callable[[HealProgress], None]


class HealingTrainer(Trainer):
    """A Trainer whose held-out loss is that of every source by itself.

    The metric by which the best weights are kept is the mean over sources of KL(original || healed) relative to its
    value before training, plus 1 if any source is worse than before: below 1 only where nothing was lost.
    """

    optimizer: Any
    control: Any
    held_out: dict[str, Tensor]
    before: dict[str, dict[str, float]]
    report: Report
    pace: _Pace

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Maps have a rate of their own; weights have decay, but not norms and biases."""
        if self.optimizer is None:
            options = self.model_options
            maps: list[Tensor] = []
            matrices: list[Tensor] = []
            vectors: list[Tensor] = []
            for name, parameter in (args[0] if args else self.model).named_parameters():
                if parameter.requires_grad:
                    in_map = name.split(".")[-1].endswith("_change")
                    (maps if in_map else matrices if parameter.dim() > 1 else vectors).append(parameter)
            rate = options.weights_rate
            groups = [
                {"params": maps, "lr": options.maps_rate, "weight_decay": 0.0},
                {"params": matrices, "lr": rate, "weight_decay": options.weight_decay},
                {"params": vectors, "lr": rate, "weight_decay": 0.0},
            ]
            fused = {"fused": True} if self.args.device.type == "cuda" else {}
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), **fused)
        return self.optimizer

    @property
    def model_options(self) -> HealOptions:
        options: HealOptions = self.accelerator.unwrap_model(self.model).options
        return options

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the metrics of the held-out windows; called by the Trainer at every evaluation."""
        figures = self.measure()
        score = self.score(figures)
        metrics = {"eval_score": score} | {f"eval_kl_{k}": f["kl"] for k, f in figures.items()}
        self.report(self._progress(held_out={k: f["kl"] for k, f in figures.items()}, score=score))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, dict[str, float]]:
        """Return the means over the held-out tokens of every source, named by FIGURES; windows are shared out."""
        model, device = self.model_wrapped, self.args.device
        model.eval()
        rank, n_ranks = self.args.process_index, self.args.world_size
        result = {}
        for source, windows in self.held_out.items():
            sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=device)
            share = -(-len(windows) // n_ranks)  # every rank runs as often, whatever is left for it
            own = windows[rank * share : (rank + 1) * share]
            at_once = self.args.per_device_train_batch_size
            for first in range(0, share, at_once):
                ids = own[first : first + at_once]
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
                    figures = model(input_ids=(ids if len(ids) else windows[:1]).to(device))["figures"]
                sums += figures if len(ids) else 0.0
            sums = self.accelerator.reduce(sums, reduction="sum") if n_ranks > 1 else sums
            n_tokens = windows.shape[0] * (windows.shape[1] - 1)
            result[source] = dict(zip(FIGURES, (sums / n_tokens).tolist(), strict=True))
        return result

    def score(self, figures: dict[str, dict[str, float]]) -> float:
        """Return the metric described above."""
        shares = [f["kl"] / max(self.before[s]["kl"], 1e-12) for s, f in figures.items()]
        return sum(shares) / len(shares) + (max(shares) > 1)

    def _progress(self, **figures: Any) -> HealProgress:
        return self.pace.progress(self.state.global_step, **figures)


class _Pace(TrainerCallback):
    """Reports how far the training is, at most once a second; time that evaluations take does not count."""

    def __init__(self, report: Report, tokens_a_step: int, n_steps: int) -> None:
        self.report, self.tokens_a_step, self.n_steps = report, tokens_a_step, n_steps
        self.seconds, self.first_step, self._began, self._told = 0.0, 0, 0.0, 0.0

    def progress(self, step: int, **figures: Any) -> HealProgress:
        trained = (step - self.first_step) * self.tokens_a_step
        rate = trained / self.seconds if self.seconds else 0.0
        return HealProgress(step * self.tokens_a_step, self.n_steps * self.tokens_a_step, rate, **figures)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self._began
        if now - self._told >= 1 and state.is_world_process_zero:
            self._told = now
            self.report(self.progress(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.report(self.progress(state.global_step, loss=logs["loss"]))


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """n_rows rows of windows, over and over: an epoch is the whole training, and every step is full."""

    def __init__(self, windows: Tensor, n_rows: int) -> None:
        self.windows, self.n_rows = windows, n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index % len(self.windows)]}


def training_arguments(options: HealOptions, scratch: Path, *, device: str) -> TrainingArguments:
    """Return the Trainer's arguments; `scratch` holds what a killed training continues from.

    Raises OptionError if the windows of a step cannot be shared out over the devices.
    """
    device = _device(device)
    steps = -(-options.tokens // (options.batch * options.seq_len))
    every = max(1, steps // options.evaluations)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=options.weights_rate,  # maps have their own, see create_optimizer
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(options.warmup * steps),
        max_grad_norm=1.0,
        bf16=options.precision == "bf16" or (options.precision == "auto" and device == "cuda"),
        use_cpu=device == "cpu",
        gradient_checkpointing=options.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=False,
        logging_steps=every,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # hundreds of a plan's constants, the same in every process
        restore_callback_states_from_checkpoint=True,
        seed=options.seed,
        data_seed=options.seed,
    )
    _share_out(arguments, options)
    return arguments


def _device(device: str) -> str:
    """Return cpu or cuda. Raises OptionError for any other, and where another way than DDP is asked for."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise OptionError(f"healing runs on cpu or cuda, found '{device}'. Choose a card with CUDA_VISIBLE_DEVICES.")
    if any(os.environ.get(f"ACCELERATE_USE_{way}", "").lower() in ("1", "true") for way in ("FSDP", "DEEPSPEED")):
        raise OptionError(
            "healing shares windows out over devices (DDP), and accelerate is told to share out the model (FSDP or "
            "DeepSpeed). Launch it without: torchrun --nproc-per-node N --no-python kvcompress heal ..."
        )
    return device


def _share_out(arguments: TrainingArguments, options: HealOptions) -> None:
    """Set how many windows of a step a process takes, and how many of those at once."""
    if arguments.world_size == 1:
        arguments._n_gpu = min(1, arguments.n_gpu)  # several cards by processes, never by threads
    share, rest = divmod(options.batch, arguments.world_size)
    if rest:
        raise OptionError(
            f"batch {options.batch} cannot be shared out over {arguments.world_size} processes. Choose a multiple."
        )
    at_once = next(n for n in range(min(share, options.device_batch), 0, -1) if share % n == 0)
    arguments.per_device_train_batch_size = at_once
    arguments.gradient_accumulation_steps = share // at_once


def make_trainer(model: Distillation, texts: HealTexts, arguments: TrainingArguments, report: Report) -> HealingTrainer:
    """Return the Trainer, its model on the device and the held-out loss before training measured (`before`)."""
    options = model.options
    pace = _Pace(report, options.batch * options.seq_len, arguments.max_steps)
    trainer = HealingTrainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(texts.training, arguments.max_steps * options.batch),
        callbacks=[pace, EarlyStoppingCallback(early_stopping_patience=options.patience)],
        eval_dataset=_Rows(texts.training, 1),  # the Trainer wants one; `measure` reads held_out
    )
    trainer.remove_callback(PrinterCallback)
    trainer.held_out, trainer.report, trainer.pace = texts.held_out, report, pace
    with model.without_new_norms():
        trainer.before = trainer.measure()
    return trainer


@contextmanager
def repeatable(wanted: bool, *, strictly: bool = False) -> Iterator[None]:
    """Within the block, if wanted, torch's kernels on a GPU give the same bits for the same input.

    strictly: attention's gradients, too, which torch leaves as they are where it may only warn. Raises OptionError
    there for a kernel that has no such form.
    """
    if not wanted:
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read at its first call
    torch.use_deterministic_algorithms(True, warn_only=not strictly)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise OptionError(
            f"this model's training cannot repeat its bits here ({str(error).splitlines()[0]}). Leave out "
            "--deterministic, or train on a CPU."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def device_name(arguments: TrainingArguments) -> str:
    """Return where the training ran, for reports."""
    if arguments.device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(arguments.device)
    return name if arguments.world_size == 1 else f"{arguments.world_size} x {name}"


def parameters_trained(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
