"""How many tokens documents have, counted or estimated; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .conversations import Conversation
from .documents import CHARACTERS_PER_TOKEN, Example
from .tokens import tokens_of


@dataclass(frozen=True, slots=True)
class Length:
    """One document's size.

    Attributes:
        num_tokens: of the whole document.
        learned: the runs of tokens that are learned, each as the first one and the one after the last.
    """

    num_tokens: int
    learned: tuple[tuple[int, int], ...]

    @property
    def num_learned(self) -> int:
        """Learned tokens; a document's first one has nothing before it to be learned from."""
        return sum(last - max(1, first) for first, last in self.learned if last > 1)

    def window_lengths(self, sequence_length: int) -> list[int]:
        """Tokens of each window in which something is learned: a token is the target of the one before it."""
        found: set[int] = set()
        for first, last in self.learned:
            if last > 1:
                found.update(range((max(1, first) - 1) // sequence_length, (last - 2) // sequence_length + 1))
        return [min(sequence_length, self.num_tokens - 1 - number * sequence_length) for number in sorted(found)]


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of all documents; *exact* where the model's tokenizer counted them."""

    documents: tuple[Length, ...]
    exact: bool

    @property
    def num_tokens(self) -> int:
        """Of all documents together."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_learned(self) -> int:
        """Learned tokens of all documents together."""
        return sum(document.num_learned for document in self.documents)

    def windows(self, sequence_length: int) -> list[int]:
        """Tokens of the windows that training makes of the documents, each document beginning one of its own."""
        if self.exact:
            return [n for document in self.documents for n in document.window_lengths(sequence_length)]
        counts = [document.num_tokens for document in self.documents]
        return [min(sequence_length, count - first) for count in counts for first in range(0, count, sequence_length)]

    def num_sequences(self, sequence_length: int) -> int:
        """As many windows."""
        return len(self.windows(sequence_length))


def document_lengths(documents: Sequence[Example], tokenizer: Any | None) -> Lengths:
    """The length of each document: counted by *tokenizer*, or estimated at CHARACTERS_PER_TOKEN where it is None.

    Raises:
        DataError: a conversation cannot be written by the tokenizer's chat template.
    """
    if tokenizer is None:
        return Lengths(tuple(_estimated(document) for document in documents), exact=False)
    return Lengths(tuple(_counted(document, tokenizer) for document in documents), exact=True)


def _counted(document: Example, tokenizer: Any) -> Length:
    tokens, learned = tokens_of(document, tokenizer)
    return Length(len(tokens), tuple(_runs(learned)))


def _runs(learned: Sequence[bool]) -> Iterator[tuple[int, int]]:
    first: int | None = None
    for index, wanted in enumerate((*learned, False)):
        if wanted and first is None:
            first = index
        elif not wanted and first is not None:
            yield first, index
            first = None


def _estimated(document: Example) -> Length:
    """Without a template's own words, of which nothing is known; rounded up once, as a whole."""
    if isinstance(document, Conversation):
        pieces = [(len(message.content), message.learned) for message in document.messages]
    else:
        pieces = [(len(document.prompt), False), (len(document.text), True)]
    total = -(-sum(count for count, _ in pieces) // CHARACTERS_PER_TOKEN)
    runs: list[tuple[int, int]] = []
    read = 0
    for count, wanted in pieces:
        first, read = -(-read // CHARACTERS_PER_TOKEN), read + count
        last = -(-read // CHARACTERS_PER_TOKEN)
        if wanted and last > first:
            runs.append((first, last))
    return Length(total, tuple(runs))
