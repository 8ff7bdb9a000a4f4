"""One document as tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .answers import Span, written
from .conversations import Conversation, Role
from .data_files import DataError
from .documents import Example

HEADINGS: Mapping[Role, str] = {
    "system": "### System",
    "user": "### Instruction",
    "assistant": "### Response",
    "tool": "### Tool",
}
"""What stands above each message of a conversation where the tokenizer has no chat template."""


def tokens_of(document: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of *document*, and for each whether it is learned.

    Prompts are read and not learned; the end-of-text token after a text is. Conversations are written by the chat
    template, and learned are the answers with the tokens that end their turns.

    Raises:
        DataError: the chat template, or a tokenizer without offsets, does not let a conversation be learned.
    """
    if isinstance(document, Conversation):
        if getattr(tokenizer, "chat_template", None):
            return _by_template(document, tokenizer)
        return _joined(_plain_turns(document), tokenizer)
    return _joined([(document.prompt, False), (document.text, True), (None, True)], tokenizer)


def _plain_turns(conversation: Conversation) -> Iterator[tuple[str | None, bool]]:
    """Headings and contents; the end-of-text token, written None, after each answer."""
    separator = ""
    for message in conversation.messages:
        yield f"{separator}{HEADINGS[message.role]}\n", False
        yield message.content, message.learned
        if message.role == "assistant":
            yield None, message.learned
        separator = "\n\n"


def _joined(pieces: Iterable[tuple[str | None, bool]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of *pieces*, each tokenized alone, so that none spans what is read and what is learned."""
    start, end = _start(tokenizer), tokenizer.eos_token_id
    tokens, learned = list(start), [False] * len(start)
    for text, is_learned in pieces:
        if text is None:
            piece = [] if end is None else [end]
        else:
            piece = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        tokens += piece
        learned += [is_learned] * len(piece)
    return tokens, learned


@lru_cache(maxsize=2)
def _start(tokenizer: Any) -> tuple[int, ...]:
    """The token that the tokenizer itself puts before a text, if any; its attributes do not always tell."""
    first = tuple(tokenizer("a")["input_ids"][:1])
    return first if first == (tokenizer.bos_token_id,) else ()


def _by_template(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of the whole text at once, as the template's own has them; it begins as it writes itself."""
    text, spans = written(conversation, tokenizer)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        raise DataError(
            f"{conversation.origin}: this model's tokenizer does not tell which characters its tokens stand for, "
            "so answers cannot be found; give text, or prompts and completions"
        ) from None
    tokens = list(encoded["input_ids"])
    learned = _learned(encoded["offset_mapping"], spans)
    end = tokenizer.eos_token_id
    if end is not None and spans[-1][1] == len(text.rstrip()) and not _ends_turn(tokens, learned, tokenizer):
        count = len(learned) - learned[::-1].index(True)
        return [*tokens[:count], end], [*learned[:count], True]
    return tokens, learned


def _learned(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token has a character in one of the *spans*.

    Tokenizers may leave white space at a token's front out of its offsets, so a token reaches back to the one before.
    """
    found: list[bool] = []
    reached = index = 0
    for first, last in offsets:
        begin = min(first, reached)
        reached = max(reached, last)
        while index < len(spans) and spans[index][1] <= begin:
            index += 1
        found.append(index < len(spans) and spans[index][0] < last and begin < last)
    return found


def _ends_turn(tokens: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> bool:
    """Whether the last learned token is one that is no text."""
    last = next((token for token, wanted in zip(reversed(tokens), reversed(learned), strict=True) if wanted), None)
    return last in tokenizer.added_tokens_decoder
