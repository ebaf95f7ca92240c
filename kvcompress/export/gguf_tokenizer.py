"""The tokenizer's metadata of a GGUF file, from tokenizer.json: what llama.cpp's own converter would write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from kvcompress.documents import Within, parse_json, read_text, shaped
from kvcompress.errors import CheckpointError, UnsupportedModelError

#: Tokenizers of 262,144 words have 33 MB.
_MOST_BYTES = 128 << 20

#: Types of a token in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL, _DIGITS = "byte-level", "digits"
#: How a text is split before the merges -> llama.cpp's name for it.
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_BYTE_LEVEL,): "gpt-2",
    (_DIGITS, _BYTE_LEVEL): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
}


_Id = Annotated[int, Within(0, 1 << 22)]


class _Added(TypedDict):
    content: str
    id: _Id
    special: bool


class _Bpe(TypedDict):
    vocab: dict[str, _Id]
    merges: list[Any]


class _Document(TypedDict):
    model: dict[str, Any]
    added_tokens: NotRequired[list[_Added]]


@dataclass(frozen=True)
class GgufVocabulary:
    """Tokens by id, their types, and how llama.cpp is to use them; `scores` for SentencePiece-like models only."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    space_prefix: bool | None


def read_vocabulary(directory: Path, vocab_size: int) -> GgufVocabulary:
    """Return the vocabulary of a checkpoint directory, padded to `vocab_size` with unused tokens.

    Raises UnsupportedModelError for a tokenizer that llama.cpp would split differently, as far as is known here, and
    CheckpointError for a file that is damaged.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModelError(
            f"{directory} has no tokenizer.json, which a GGUF file is made from. Save its tokenizer with transformers."
        )
    try:
        return _vocabulary(shaped(parse_json(read_text(file, most=_MOST_BYTES)), _Document), vocab_size)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # of a stranger's fields
        raise CheckpointError(f"{file} is damaged ({error}). Download or save it again.") from error


def _vocabulary(document: dict[str, Any], vocab_size: int) -> GgufVocabulary:
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise UnsupportedModelError(
            f"the tokenizer is a {model.get('type')} model; only BPE is written to GGUF. "
            "Use --to hf and llama.cpp's own converter, where its heads stay as they are (r = 1)."
        )
    model = shaped(model, _Bpe, "model")
    vocabulary = {**model["vocab"], **{t["content"]: t["id"] for t in document.get("added_tokens", [])}}
    added = {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in document.get("added_tokens", [])}
    by_id = {i: token for token, i in vocabulary.items()}
    n_tokens = max(vocab_size, max(by_id) + 1)
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(n_tokens)]
    types = [added.get(i, NORMAL if i in by_id else UNUSED) for i in range(n_tokens)]
    if model.get("byte_fallback"):
        return _sentencepiece(document, tokens, types)
    return GgufVocabulary("gpt2", _pre_tokenizer(document), tokens, types, None, None)


def _sentencepiece(document: dict[str, Any], tokens: list[str], types: list[int]) -> GgufVocabulary:
    """Return a BPE with byte fallback as SentencePiece's: a token's score is its merge's rank, negated."""
    model = document["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    scores = [
        -float(ranks.get(token, 0 if kind != NORMAL else len(ranks))) for token, kind in zip(tokens, types, strict=True)
    ]
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
        elif token == model.get("unk_token"):
            types[i] = UNKNOWN
    normalizers = (document.get("normalizer") or {}).get("normalizers", [])
    prefix = any(n["type"] == "Prepend" for n in normalizers)
    prefix |= (document.get("pre_tokenizer") or {}).get("prepend_scheme") in ("first", "always")
    return GgufVocabulary("llama", "default", tokens, types, scores, prefix)


def _pre_tokenizer(document: dict[str, Any]) -> str:
    """Return llama.cpp's name for how the text is split."""
    given = document.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    split = []
    for step in steps:
        if step.get("type") == "ByteLevel" and step.get("use_regex", True):
            split.append(_BYTE_LEVEL)
        elif step.get("type") == "Digits":
            split.append(_DIGITS)
        elif step.get("type") == "Split":
            split.append(step["pattern"].get("Regex", ""))
        elif step.get("type") != "ByteLevel":
            split.append(str(step.get("type")))
    if tuple(split) not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"the tokenizer splits text in a way that has no known name in llama.cpp ({' then '.join(split)!r:.120}). "
            "Use --to hf, and llama.cpp's own converter where its heads stay as they are (r = 1)."
        )
    return PRE_TOKENIZERS[tuple(split)]
