"""From a JSON object or a row of a table to the parts of a document.

A record is a document by one of its fields:

    {"text": "..."}
    {"parts": [{"text": "...", "loss": false}, {"text": "..."}]}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Messages become parts, their content as it is: a model is trained to predict those of the assistant and reads the
others. A field that is null counts as missing, and a record in which all that it has of these is null is an empty
document. `text_field` names another field to be read as the text; the three above are then ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, model_validator
from pydantic_core import from_json

FIELDS = ("text", "parts", "messages")
SHOWN_FIELDS = 12  # of a record, in a message


@dataclass(slots=True)
class Part:
    text: str
    loss: bool = True


class JsonDocument(BaseModel):
    """A record with text or parts; other fields are ignored."""

    text: str | None = None
    parts: list[Part] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "JsonDocument":
        if (self.text is None) == (self.parts is None):
            raise ValueError("expected either the field text or the field parts")
        return self


class Scalar(Protocol):
    """A value of pyarrow's."""

    def as_py(self) -> Any: ...


def fields_of(text_field: str | None) -> Sequence[str]:
    """The fields by which a record is a document."""
    return FIELDS if text_field is None else (text_field,)


def from_line(line: bytes, text_field: str | None = None) -> list[Part]:
    """The parts of a line of JSON. Raises ValueError, perhaps pydantic's, saying what is wrong with it."""
    try:
        fields = from_json(line)
    except ValueError:
        return _parts(JsonDocument.model_validate_json(line))
    if type(fields) is dict:  # the usual line takes a third of the time
        text = fields.get(text_field or "text")
        if type(text) is str and (text_field is not None or fields.get("parts") is None):
            return [Part(text)]
        return _from_fields(fields, text_field, lambda: JsonDocument.model_validate_json(line))
    return _parts(JsonDocument.model_validate_json(line))


def from_value(value: object, text_field: str | None = None) -> list[Part]:
    """The same of an element of a JSON array, which may also be the text alone."""
    if isinstance(value, str):
        return [Part(value)]
    if not isinstance(value, dict):
        raise ValueError(f"found {str(value)[:120]!r}; expected an object or a text")
    return _from_fields(value, text_field, lambda: JsonDocument.model_validate(value))


def from_row(row: Mapping[str, Scalar], text_field: str | None = None) -> list[Part]:
    """The same of a row of Parquet or Arrow with its columns among `fields_of`. Text may also be bytes in UTF-8."""
    fields = {name: value.as_py() for name, value in row.items() if name != "messages"}
    if "messages" in row and all(value is None for value in fields.values()):
        fields["messages"] = row["messages"].as_py()
    return _from_fields(fields, text_field, lambda: JsonDocument.model_validate(fields))


def missing_field(found: Sequence[str], text_field: str | None, what: str = "field") -> str:
    """What to say where there is none of the fields that were looked for."""
    shown = (", ".join(found[:SHOWN_FIELDS]) + (" ..." if len(found) > SHOWN_FIELDS else "")) if found else f"no {what}"
    if text_field is not None:
        return f"--text-field: expected a {what} {text_field}, found {shown}"
    expected = "a column text or parts" if what == "column" else "either the field text or the field parts"
    return f"expected {expected}, found {shown}; messages of a chat are read too, and with --text-field NAME any {what}"


def _from_fields(fields: dict[str, Any], text_field: str | None, validate: Callable[[], JsonDocument]) -> list[Part]:
    if not any(name in fields for name in fields_of(text_field)):
        raise ValueError(missing_field(list(fields), text_field))
    if text_field is not None:
        return _from_text(fields[text_field], text_field)
    if fields.get("text") is None and fields.get("parts") is None:
        messages = fields.get("messages")
        return [] if messages is None else _from_messages(messages)
    return _parts(validate())


def _parts(document: JsonDocument) -> list[Part]:
    return [Part(document.text or "")] if document.parts is None else document.parts


def _from_text(text: object, name: str) -> list[Part]:
    if isinstance(text, bytes):
        text = text.decode()
    if text is None:
        return []
    if not isinstance(text, str):
        raise ValueError(f"{name}: found {str(text)[:120]!r}; expected a string")
    return [Part(text)]


def _from_messages(messages: object) -> list[Part]:
    if not isinstance(messages, list):
        raise ValueError(f"messages: found {str(messages)[:120]!r}; expected a list of objects with role and content")
    parts = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(
                f"messages.{number}: found {str(message)[:120]!r}; expected an object with role and content"
            )
        for call in "tool_calls", "function_call":
            if message.get(call):
                raise ValueError(f"messages.{number}.{call}: cannot be turned into text; write the text as parts")
        parts.append(Part(_content(message["content"], number), message["role"] == "assistant"))
    return parts


def _content(content: object, number: int) -> str:
    """The text of a message: a string, null, or a list of {"type": "text", "text": "..."}."""
    blocks = content if isinstance(content, list) else ["" if content is None else content]
    texts = [block.get("text") if isinstance(block, dict) else block for block in blocks]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"messages.{number}.content: found {str(content)[:120]!r}; expected text")
    return "".join(map(str, texts))
