"""Conversations as rows hold them: OpenAI's messages, ShareGPT's turns, Alpaca's instructions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .data_files import DataError, Row

Role = Literal["system", "user", "assistant", "tool"]

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Who speaks, under every name that is understood."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says in its turn, and whether the model shall learn to say it."""

    role: Role
    content: str
    learned: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example of turns, written as the model's chat template has it; only learned messages are learned.

    Attributes:
        origin: where it was read, for messages.
    """

    messages: tuple[Message, ...]
    origin: str = field(default="", compare=False, repr=False)


def conversation(row: Row, column: str) -> Conversation:
    """The messages in one *column*: each answer is learned, unless OpenAI's ``weight`` of it is 0."""
    system = _system(row) if column == "conversations" else ()
    return Conversation((*system, *_messages(row, column, learn=True)), row.place)


def prompted(row: Row) -> Conversation:
    """A prompt and its completion that are lists of messages: only the completion's answers are learned."""
    read, learned = (_messages(row, name, learn=name == "completion") for name in ("prompt", "completion"))
    return Conversation((*read, *learned), row.place)


def instruction(row: Row) -> Conversation:
    """Alpaca's row: *instruction* with *input*, if there is one, is asked, and *output* learned.

    So are the answers of *history*, the rounds before, as LLaMA-Factory learns them.
    """
    asked = text_in(row, "instruction")
    given = text_in(row, "input") if row.columns.get("input") is not None else ""
    question = "\n\n".join(part for part in (asked, given) if part.strip())
    answer = text_in(row, "output")
    rounds = [*_history(row), (question, answer)]
    turns = (turn for said, told in rounds for turn in (Message("user", said), _answer(told)))
    return Conversation((*_system(row), *turns), row.place)


def _answer(text: str) -> Message:
    return Message("assistant", text, bool(text.strip()))


def _history(row: Row) -> list[tuple[str, str]]:
    """The rounds before an instruction: pairs of what was asked and answered."""
    value = row.columns.get("history") or []
    if isinstance(value, str):  # as CSV has to write it
        value = _from_json(row, "history", "pairs")
    if not isinstance(value, list):
        raise DataError(f"{row.place}: history is {type(value).__name__}, expected a list of pairs")
    rounds: list[tuple[str, str]] = []
    for number, pair in enumerate(value, start=1):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise DataError(f"{row.place}: round {number} of history is no pair of a question and an answer")
        asked, told = (checked_text(row.place, f"round {number} of history", said) for said in pair)
        rounds.append((asked, told))
    return rounds


def text_in(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: there is none, or something else.
    """
    return checked_text(row.place, column, row.columns[column])


def checked_text(place: str, what: str, value: Any) -> str:
    """*value*, once it is seen to be text that any tokenizer can read."""
    if value is None:
        raise DataError(f"{place} has no {what}; give one, or leave the row out")
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: {what} holds half a surrogate pair, which is no character") from None
    return value


def _system(row: Row) -> tuple[Message, ...]:
    """What ShareGPT's and Alpaca's rows may have beside the turns."""
    if row.columns.get("system") is None:
        return ()
    text = text_in(row, "system")
    return (Message("system", text),) if text.strip() else ()


def _messages(row: Row, column: str, *, learn: bool) -> tuple[Message, ...]:
    value = row.columns[column]
    if isinstance(value, str):  # as CSV has to write it
        value = _from_json(row, column, "messages")
    if value is None:
        raise DataError(f"{row.place} has no {column}; give some, or leave the row out")
    if not isinstance(value, list):
        raise DataError(f"{row.place}: {column} is {type(value).__name__}, expected a list of messages")
    return tuple(
        _message(row.place, f"message {number} of {column}", entry, learn=learn)
        for number, entry in enumerate(value, start=1)
    )


def _from_json(row: Row, column: str, what: str) -> Any:
    try:
        return json.loads(row.columns[column])
    except (ValueError, RecursionError):
        raise DataError(f"{row.place}: {column} is text that is no JSON list of {what}") from None


def _message(place: str, what: str, entry: Any, *, learn: bool) -> Message:
    if not isinstance(entry, dict):
        raise DataError(f"{place}: {what} is {type(entry).__name__}, expected {{role, content}} or {{from, value}}")
    who, said = ("role", "content") if "role" in entry else ("from", "value")
    if who not in entry or said not in entry:
        keys = ", ".join(repr(str(key)) for key in list(entry)[:8]) or "nothing"
        raise DataError(f"{place}: {what} has {keys}, expected 'role' and 'content', or 'from' and 'value'")
    name = checked_text(place, f"{who} of {what}", entry[who])
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise DataError(f"{place}: {what} is from {name[:40]!r}; known are {', '.join(ROLES)}")
    if entry.get("tool_calls"):
        raise DataError(f"{place}: {what} has tool_calls, which are not learned here; write them as its {said}")
    content = checked_text(place, f"{said} of {what}", _joined(place, what, entry[said]))
    weight = 1 if entry.get("weight") is None else entry["weight"]
    if weight not in (0, 1):
        raise DataError(f"{place}: the weight of {what} is {str(weight)[:40]}, expected 0 or 1")
    return Message(role, content, learn and role == "assistant" and weight == 1 and bool(content.strip()))


def _joined(place: str, what: str, content: Any) -> Any:
    """OpenAI's list of parts as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{place}: {what} has a part of type {str(kind)[:40]}; only text is learned")
    return "".join(part["text"] for part in content)
