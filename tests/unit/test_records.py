"""Chat logs as text: worded by the model's own chat template, or plainly and with a note where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompress.calibration.text import documents, token_windows
from kvcompress.errors import CalibrationError, Note
from kvcompress.evaluate.windows import evaluation_windows
from tests.tiny_models import EOS, build_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "The one in the letter."}]
WORDED = "<s>user\nWhich river?</s>\n<s>assistant\nThe one in the letter.</s>\n"
RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES, "id": 7},
    "prompt and completion": {"prompt": "Which river?", "completion": "The one in the letter."},
    "prompt and completion as messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "conversations": {
        "conversations": [
            {"from": "human", "value": "Which river?"},
            {"from": "gpt", "value": "The one in the letter."},
        ]
    },
    "content in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "Which river?"}]},
            MESSAGES[1],
        ]
    },
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def chatting() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(directory: Path, *records: Any) -> str:
    file = directory / "log.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("shape", RECORDS)
def test_a_conversation_is_worded_by_the_template(tmp_path: Path, chatting: Any, shape: str) -> None:
    assert list(documents(write(tmp_path, RECORDS[shape]), chatting)) == [WORDED]


def test_special_tokens_of_the_template_are_tokens(tmp_path: Path, chatting: Any) -> None:
    """The window is what the model sees when it serves: not the letters of its marks."""
    windows = token_windows(chatting, write(tmp_path, *[RECORDS["messages"]] * 4), 1, 16)
    expected = chatting.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert windows[0].tolist() == [*expected, EOS][:16]
    assert EOS in windows[0].tolist()


def test_evaluation_reads_them_alike(tmp_path: Path, chatting: Any) -> None:
    source = write(tmp_path, *[RECORDS["messages"]] * 4)
    assert evaluation_windows(chatting, source, 16, 1)[0].tolist() == token_windows(chatting, source, 1, 16).tolist()


@pytest.mark.parametrize("tokenizer", ["plain", None])
def test_without_a_template_they_are_plain_text_and_a_note(
    tmp_path: Path, request: pytest.FixtureRequest, tokenizer: str | None
) -> None:
    found = request.getfixturevalue(tokenizer) if tokenizer else None
    with pytest.warns(Note, match="no chat template"):
        (text,) = documents(write(tmp_path, RECORDS["messages"]), found)
    assert text == "user: Which river?\n\nassistant: The one in the letter."


def test_text_fields_come_first_and_ask_no_template(tmp_path: Path, plain: Any) -> None:
    assert list(documents(write(tmp_path, {"text": "A letter.", "messages": MESSAGES}), plain)) == ["A letter."]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 3, "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": ["x"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        {"conversations": {}},
        {"prompt": "x"},
        {"prompt": "x", "completion": 3},
        {"prompt": [], "completion": []},
    ],
    ids=json.dumps,
)
def test_records_that_are_none(tmp_path: Path, chatting: Any, record: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"line 2: expected an object with a text .* messages, conversations"):
        list(documents(write(tmp_path, {"text": "ok"}, record), chatting))


def test_what_the_template_refuses_names_the_line(tmp_path: Path, chatting: Any) -> None:
    record = {"messages": [*MESSAGES, {"role": "tool", "content": "3"}]}
    with pytest.raises(CalibrationError, match=r"line 2: the model's chat template .* \(no tools here\)") as error:
        list(documents(write(tmp_path, {"text": "ok"}, record), chatting))
    assert "\n" not in str(error.value)


def test_datasets_of_conversations(monkeypatch: pytest.MonkeyPatch, chatting: Any) -> None:
    served = SimpleNamespace(load_dataset=lambda *_, **__: [RECORDS["messages"], RECORDS["conversations"]])
    monkeypatch.setitem(sys.modules, "datasets", served)
    assert list(documents("org/chats", chatting)) == [WORDED, WORDED]
