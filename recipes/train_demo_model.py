"""Train the demo model that ships with kvcompress: a small llama with its own tokenizer, on public text.

    python recipes/train_demo_model.py --data DIR --out kvcompress/assets/demo [--minutes 4]

DIR holds gutenberg_train.jsonl.gz (books, one {"text": ...} a line), tinystories_200k.txt and
python_stdlib_train.txt.gz. Every 20th book and the last twentieth of the other two are held out; the weights with
the lowest held-out loss are kept, so training stops improving the output before it overfits. On a GPU it takes the
given minutes plus one for the tokenizer; on a CPU it runs too, but learns little in the time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
CONFIG = {
    "vocab_size": 3072,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SEQ_LEN = 1024
LEARNING_RATE = 3e-3
#: Small sources are repeated, so that the model meets stories and code often enough to learn them.
REPEATS = {"books": 1, "stories": 4, "code": 1}


def read_documents(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return (training, held-out) documents by source."""
    with gzip.open(data / "gutenberg_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        books = [json.loads(line)["text"] for line in lines]
    stories = (data / "tinystories_200k.txt").read_text(encoding="utf-8")
    with gzip.open(data / "python_stdlib_train.txt.gz", "rt", encoding="utf-8") as file:
        code = file.read()
    training = {"books": [b for i, b in enumerate(books) if i % 20 != 19]}
    held_out = {"books": books[19::20]}
    for name, text in (("stories", stories), ("code", code)):
        cut = len(text) * 19 // 20
        training[name], held_out[name] = [text[:cut]], [text[cut:]]
    return training, held_out


def train_tokenizer(documents: Iterator[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=CONFIG["vocab_size"], min_frequency=2, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    tokenizer.model_max_length = CONFIG["max_position_embeddings"]
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """Return all documents as one line of ids, each followed by the end token."""
    pieces = [d[i : i + 100_000] for d in documents for i in range(0, len(d), 100_000)]
    ends = {id(p) for p in pieces if not p}
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
    ids = [i for e, p in zip(encoded, pieces, strict=True) if id(p) not in ends for i in e.ids]
    return torch.tensor([*ids, CONFIG["eos_token_id"]])


def batch(ids: Tensor, size: int, generator: torch.Generator, device: str) -> Tensor:
    """Return random windows [size, SEQ_LEN + 1]."""
    starts = torch.randint(len(ids) - SEQ_LEN - 1, (size, 1), generator=generator).to(ids.device)
    return ids[starts + torch.arange(SEQ_LEN + 1, device=ids.device)].to(device)


def loss_of(model: torch.nn.Module, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def held_out_losses(model: torch.nn.Module, held_out: dict[str, Tensor], device: str) -> dict[str, float]:
    """Return the mean loss on the first windows of each held-out source."""
    losses = {}
    for name, ids in held_out.items():
        n = min(32, (len(ids) - 1) // SEQ_LEN)
        windows = torch.stack([ids[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in range(n)]).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            losses[name] = float(torch.stack([loss_of(model, w) for w in windows.split(16)]).mean())
    return losses


def train(args: argparse.Namespace, training: Tensor, held_out: dict[str, Tensor]) -> tuple[LlamaForCausalLM, dict]:
    """Return the model with the best held-out loss on books, and the log of losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device)
    step_model = torch.compile(model) if device == "cuda" else model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    best, best_loss, log, step = {}, math.inf, [], 0
    loss = torch.tensor(math.nan)
    started, next_check = None, 0.1
    training = training.to(device)
    while True:
        share = 0.0 if started is None else (time.monotonic() - started) / (60 * args.minutes)
        if share >= next_check or share >= 1:
            next_check += 0.1
            losses = held_out_losses(model, held_out, device)
            log.append({"step": step, "training": float(loss.detach()), "held_out": losses})
            print(json.dumps(log[-1]), flush=True)
            if losses["books"] < best_loss:
                best_loss = losses["books"]
                best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            if share >= 1:
                break
        # warm up over 200 steps, then a cosine over the time that is given
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 200) * (0.02 + 0.98 * math.cos(math.pi / 2 * share) ** 2)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(step_model, batch(training, args.batch, generator, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 3:  # the first steps compile
            started = time.monotonic()
    model.load_state_dict(best)
    return model, {"steps": step, "tokens": step * args.batch * SEQ_LEN, "log": log, "best_held_out": best_loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    training_texts, held_out_texts = read_documents(args.data)
    tokenizer = train_tokenizer(d for documents in training_texts.values() for d in documents)
    training = torch.cat(
        [encode(tokenizer, documents).repeat(REPEATS[name]) for name, documents in training_texts.items()]
    )
    held_out = {name: encode(tokenizer, documents) for name, documents in held_out_texts.items()}
    print(f"{len(training):,} training tokens; held out: { {k: len(v) for k, v in held_out.items()} }", flush=True)
    model, log = train(args, training, held_out)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(log, indent=1))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, held-out loss {log['best_held_out']:.3f} nats")


if __name__ == "__main__":
    main()
