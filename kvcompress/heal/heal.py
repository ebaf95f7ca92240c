"""heal(): an output and text -> the same output, trained to do what the uncompressed model does.

Output -> model and teacher -> texts -> trainable layers -> Trainer -> maps and weights -> writer -> measured again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.checkpoint.writer import atomic_directory, check_target, make_directory
from kvcompress.documents import DocumentError, read_json
from kvcompress.errors import OptionError, OutputError
from kvcompress.heal.checkpoints import explained_disk, last_checkpoint
from kvcompress.heal.options import HealOptions
from kvcompress.heal.student import Student
from kvcompress.heal.texts import HealTexts, heal_texts
from kvcompress.heal.write import write_record, write_trained
from kvcompress.plan import Plan
from kvcompress.runtime.output import original_of

if TYPE_CHECKING:
    from kvcompress.heal.trainer import HealProgress

#: What is being trained, beside the checkpoints from which a killed training goes on.
_NOTE_FILE = "training.json"


@dataclass(frozen=True)
class HealResult:
    """What heal() made: `stage` is what healing.json says of it; `kept` whether the trained weights were better."""

    output: Path
    plan: Plan
    stage: dict[str, Any]

    @property
    def kept(self) -> bool:
        return bool(self.stage["kept"])


def heal(
    directory: str | Path,
    output: str | Path,
    options: HealOptions | None = None,
    *,
    base: str | None = None,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    progress: Callable[[HealProgress], None] | None = None,
    texts: HealTexts | None = None,
) -> HealResult:
    """Train the output `directory` of compress() and write the result to `output`, atomically; same format and bytes.

    The best weights by held-out loss are kept; where none are better on every text, the output is written as it was,
    and the result says so. base: the original checkpoint, for a folded or maps-only output. resume: continue a
    training that was killed; on one device the result is that of an unbroken one, bit for bit. texts: windows
    instead of those that `options.text` gives. Under torchrun every process calls this, and the first one writes.
    Raises a KVCompressError with one clear message.
    """
    options, directory, output = options or HealOptions(), Path(directory), Path(output)
    plan, started = Plan.load(directory), time.monotonic()
    _check(plan, options, directory, output, force=force)
    trainers = _import_trainer()
    scratch = output.parent / f".{output.name}.training"
    arguments = trainers.training_arguments(options, scratch, device=device)
    with (
        _original(directory, plan, base) as source,
        _explained_memory(options),
        trainers.repeatable(options.deterministic),
    ):
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        student = Student.of(directory, plan, source, device=arguments.device, dtype=dtype)
        texts = texts or _texts(student, source, options)
        before, protocol = student.figures(texts.held_out) if is_main_process() else ({}, {})
        model = student.distillation(options, texts.training)
        with explained_disk(scratch):
            checkpoint = _begin(scratch, plan, options, texts, resume=resume)
            trainer = trainers.make_trainer(model, texts, arguments, progress or (lambda _: None))
            with trainers.repeatable(options.deterministic, strictly=True):
                trainer.train(resume_from_checkpoint=checkpoint)
        stage = _stage(trainers, trainer, model, texts, protocol) | {"seconds": time.monotonic() - started}
        if is_main_process():
            _write(directory, plan, student, source, before, stage, texts, output, force=force)
            shutil.rmtree(scratch, ignore_errors=True)
    return HealResult(output, plan, stage)


def _stage(trainers: Any, trainer: Any, model: Any, texts: HealTexts, protocol: dict[str, Any]) -> dict[str, Any]:
    """Return what healing.json says of a training, without its time and what it gave."""
    options, best = model.options, trainer.state.best_metric
    return {
        "train": options.train,
        "kept": best is not None and best < 1,
        "tokens": trainer.state.global_step * options.batch * options.seq_len,
        "parameters": trainers.parameters_trained(model),
        "device": trainers.device_name(trainer.args),
        "text_sha256": texts.sha256,
        "options": options.to_json(),
        "protocol": protocol,
    }


def _texts(student: Student, source: Path, options: HealOptions) -> HealTexts:
    """Return the windows that the options ask for, cut by the tokenizer of the original."""
    tokenizer = load_tokenizer(source)
    return heal_texts(
        tokenizer,
        options.text,
        tokens=options.tokens,
        seq_len=options.seq_len,
        held_out=options.held_out,
        sample=lambda n: student.sampled(tokenizer, n, options.seq_len, seed=options.seed),
    )


def _begin(scratch: Path, plan: Plan, options: HealOptions, texts: HealTexts, *, resume: bool) -> str | None:
    """Return where the training goes on from, or None; note beside its checkpoints what is trained.

    Raises OptionError if what is to be continued was another training.
    """
    note = {"options": options.to_json(), "text_sha256": texts.sha256, "sites": [str(s) for s in plan.sites]}
    file, checkpoint = scratch / _NOTE_FILE, last_checkpoint(scratch) if resume else None
    if checkpoint is not None and _noted(file) != note:
        raise OptionError(
            f"{scratch} holds a training with other options, text or maps. Continue it with those, or leave out "
            "--resume."
        )
    if checkpoint is None and is_main_process():
        shutil.rmtree(scratch, ignore_errors=True)
        make_directory(scratch)
        file.write_text(json.dumps(note), encoding="utf-8")
    return checkpoint


def _noted(file: Path) -> dict[str, Any] | None:
    """Return what a training's note says, None where there is none or it was cut short."""
    try:
        return read_json(file)
    except (DocumentError, OSError):
        return None


@contextmanager
def _explained_memory(options: HealOptions) -> Iterator[None]:
    """Turn a GPU that is too small into one clear OptionError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"the GPU has too little memory for {options.device_batch} windows of {options.seq_len} tokens at once. "
            "Lower --device-batch or --seq-len, or add --gradient-checkpointing."
        ) from error


def is_main_process() -> bool:
    """Return whether this process writes the output: the only one, or the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _write(
    directory: Path,
    plan: Plan,
    student: Student,
    source: Path,
    before: dict[str, Any],
    stage: dict[str, Any],
    texts: HealTexts,
    output: Path,
    *,
    force: bool,
) -> None:
    """Write what was trained, measure it as it was written, and take it back if it is worse anywhere."""
    with atomic_directory(output, force=force) as target:
        after = before
        if stage["kept"]:
            write_trained(directory, plan, student.trained_maps(), student.trained_weights(), target)
            student.reload(target, source)
            after, _ = student.figures(texts.held_out)
            stage["kept"] = all(after[text]["kl_nats"] <= before[text]["kl_nats"] for text in before)
        if not stage["kept"]:
            shutil.rmtree(target)
            target.mkdir()
            write_trained(directory, plan, None, {}, target)
            after = before
        stage["texts"] = {text: {"before": before[text], "after": after[text]} for text in before}
        write_record(directory, plan, stage, target)


def _check(plan: Plan, options: HealOptions, directory: Path, output: Path, *, force: bool) -> None:
    """Raise an OptionError or OutputError for what cannot be healed so."""
    if output.resolve().is_relative_to(directory.resolve()) or directory.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} overlaps {directory}, which is never written to. Choose another.")
    check_target(output, force=force)
    if plan.form == "coded" and options.train != "maps":
        raise OptionError(
            f"{directory} is in the coded form, whose weights stay those of the original. Use --train maps, or "
            "compress with --folded to train weights."
        )
    if plan.form == "coded" and options.learning_rate is not None:
        raise OptionError("no weight of a coded output is trained, so there is no rate of weights. Use --maps-rate.")
    if plan.form == "coded" and options.head_norm:
        raise OptionError("a norm of head outputs changes the model, so it is for folded outputs. Leave it out.")
    if plan.form == "coded" and options.compile:
        raise OptionError("layers are compiled for folded outputs alone: coded ones differ too much. Leave it out.")
    if options.seq_len <= plan.sinks + plan.recent + 1:
        raise OptionError(
            f"seq_len {options.seq_len} is no longer than the exact tokens ({plan.sinks} sinks, {plan.recent} recent), "
            "so no query would see a compressed one. Raise --seq-len."
        )


def _import_trainer() -> Any:
    """Return the module that needs accelerate. Raises OptionError where it is missing."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "healing trains with accelerate, which is not installed: pip install 'kvcompress[heal]'."
        ) from error
    from kvcompress.heal import trainer

    return trainer


@contextmanager
def _original(directory: Path, plan: Plan, base: str | None) -> Iterator[Path]:
    """Yield where the uncompressed model lies: the output itself, if it is coded and whole, or its source."""
    if plan.form == "coded" and (directory / "config.json").is_file():
        yield directory
        return
    with original_of(directory, plan, base) as source:
        yield source
