"""Records of JSONL files and `datasets` as documents: text fields, and chats as the model's tokenizer words them.

What people have of their users is often a log of chats. Three shapes are read: `messages` (role, content), `prompt`
with `completion` (texts, or lists of messages), and `conversations` (from, value). The model's own chat template makes
text of them, so that calibration and evaluation see the tokens that the model sees when it serves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcompress.errors import CalibrationError, Note

TEXT_FIELDS = ("text", "content", "document")
#: What every refusal says that a record may be.
EXPECTED = f"a text ({', '.join(TEXT_FIELDS)}), messages, conversations, or prompt with completion"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecordReader:
    """Turns records into documents.

    tokenizer: words conversations by its chat template; without one, or without a template, they are read as plain
    text, a message a paragraph that begins with its role, and a Note says so.
    """

    tokenizer: Any = None

    def document(self, record: Any, place: Callable[[], str]) -> str:
        """Return the document of a record. Raises CalibrationError with its place, where it is none."""
        if isinstance(record, dict):
            for name in TEXT_FIELDS:
                if isinstance(record.get(name), str):
                    return str(record[name])
            messages = _messages(record)
            if messages:
                return self._worded(messages, place)
        raise CalibrationError(f"{place()}: expected an object with {EXPECTED}.")

    def _worded(self, messages: list[Message], place: Callable[[], str]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            warnings.warn(_PLAIN, Note, stacklevel=2)
            return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CalibrationError(
                f"{place()}: the model's chat template does not take this conversation ({reason}). "
                "Leave the record out, or give its text in a field 'text'."
            ) from error


_PLAIN = (
    "the tokenizer has no chat template: conversations are read as plain text, 'role: content', a message a paragraph. "
    "Give texts in a field 'text' to word them otherwise."
)


def _messages(record: dict[str, Any]) -> list[Message] | None:
    """Return a record's messages, {role, content} each; None where it holds no conversation."""
    if "messages" in record:
        return _listed(record["messages"])
    if "conversations" in record:
        return _listed(record["conversations"])
    if "prompt" in record and "completion" in record:
        asked, answered = _listed(record["prompt"], "user"), _listed(record["completion"], "assistant")
        return asked + answered if asked and answered else None
    return None


def _listed(value: Any, role: str | None = None) -> list[Message] | None:
    """Return messages of a list, or of one text said by `role`."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        return None
    found = [_message(v) for v in value]
    return [m for m in found if m] if all(found) else None


def _message(value: Any) -> Message | None:
    if not isinstance(value, dict):
        return None
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if isinstance(content, list):  # parts, as the interfaces of hosted models have them: their texts
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(map(str, texts)) if all(isinstance(t, str) for t in texts) else None
    if content is None and isinstance(value.get("tool_calls"), list):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    others = {k: v for k, v in value.items() if k in ("tool_calls", "tool_call_id", "name")}
    return {"role": _ROLES.get(role, role), "content": content, **others}
