"""A conversation as the tokenizer's chat template writes it, and where in that text the learned answers stand.

A template is a program that says nothing of which characters are whose. Each answer is found in one of two ways, both
of which check themselves:

1. The conversation is written once more with a mark for each learned answer. What stands between the marks must stand
   between the answers, to the last character.
2. Where that fails, as where a template takes reasoning out of earlier turns: the conversation up to the answer, with
   the words that call for one, must begin the whole; what comes next is the answer.

Where neither holds, the data is refused. An answer ends with the special token right after it, which ends the turn.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from transformers.utils import chat_template_utils

from .conversations import Conversation, Message
from .data_files import DataError

Span = tuple[int, int]
"""The first character of something, and the one after its last."""

END_OF_REASONING = "</think>"
"""What templates cut off earlier answers ends with this."""


def written(conversation: Conversation, tokenizer: Any) -> tuple[str, list[Span]]:
    """The text of *conversation*, and the spans in it that are learned, ends of turns included.

    Raises:
        DataError: the template refuses the conversation, leaves out what is asked, or hides where answers stand.
    """
    messages = conversation.messages
    whole = _write(conversation, messages, tokenizer)
    for number, message in enumerate(messages, start=1):
        if message.role in ("system", "user") and message.content.strip() not in whole:
            raise DataError(
                f"{conversation.origin}: the chat template leaves out message {number}, from {message.role}; "
                "put its text into another message"
            )
    spans = _by_marks(conversation, whole, tokenizer) or list(_by_prefixes(conversation, whole, tokenizer))
    return whole, [(first, _end_of_turn(whole, last, tokenizer)) for first, last in spans]


def _write(
    conversation: Conversation, messages: Sequence[Message], tokenizer: Any, *, call_for_answer: bool = False
) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    stop_the_clock(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=call_for_answer)
    except Exception as error:  # a template is a program of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{conversation.origin}: the chat template refuses this conversation: {reason}") from error
    return text


DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""What templates that write today's date are told it is, the day that Llama 3.1's own names where it is told none: on
any other the same data would be other tokens, and a run could not be resumed the day after."""


def stop_the_clock(tokenizer: Any) -> None:
    """Let it be DAY in the templates of *tokenizer*."""
    template = tokenizer.get_chat_template()
    chat_template_utils._compile_jinja_template(template).environment.globals["strftime_now"] = DAY.strftime


def _by_marks(conversation: Conversation, whole: str, tokenizer: Any) -> list[Span] | None:
    """Every learned answer, from the text with marks in their places; None where the two texts differ elsewhere."""
    marks = [f"\ue000{number}\ue001" for number in range(len(conversation.messages))]
    pairs = list(zip(conversation.messages, marks, strict=True))
    marked = _write(conversation, [Message(m.role, mark) if m.learned else m for m, mark in pairs], tokenizer)
    spans: list[Span] = []
    read = reached = 0
    for message, mark in pairs:
        if not message.learned:
            continue
        place = marked.find(mark, read)
        between = marked[read:place]
        if place < 0 or not whole.startswith(between, reached):
            return None
        first = reached + len(between)
        reached = _after(message.content, whole, first)
        if reached < 0:
            return None
        spans.append((first, reached))
        read = place + len(mark)
    return spans if whole[reached:] == marked[read:] else None


def _by_prefixes(conversation: Conversation, whole: str, tokenizer: Any) -> Iterator[Span]:
    """Every learned answer, from the text up to it, which must begin the whole."""
    messages = conversation.messages
    for index, message in enumerate(messages):
        if not message.learned:
            continue
        before = _write(conversation, messages[:index], tokenizer, call_for_answer=True) if index else ""
        upto = _write(conversation, messages[: index + 1], tokenizer)
        first = len(before)
        called = index and before != _write(conversation, messages[:index], tokenizer)
        last = len(upto.rstrip()) if called and whole.startswith(upto) else _after(message.content, whole, first)
        if not index or not whole.startswith(before) or last <= first:
            raise DataError(
                f"{conversation.origin}: the chat template rewrites message {index + 1}, so which tokens are the "
                "answer's cannot be told; change that message, or the template"
            )
        yield first, last


def _after(content: str, whole: str, first: int) -> int:
    """Where *content* ends that begins at *first*: as it is, trimmed, or without its reasoning; -1 if it does not."""
    for shown in (content, content.strip(), content.rpartition(END_OF_REASONING)[2].strip()):
        if shown and whole.startswith(shown, first):
            return first + len(shown)
    return -1


def _end_of_turn(whole: str, last: int, tokenizer: Any) -> int:
    found = _markers(tokenizer).match(whole, last)
    return found.end() if found else last


@lru_cache(maxsize=2)
def _markers(tokenizer: Any) -> re.Pattern[str]:
    """White space and a token that is no text."""
    tokens = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    words = "|".join(re.escape(token) for token in tokens if token.strip())
    return re.compile(rf"\s*(?:{words})" if words else "(?!)")
