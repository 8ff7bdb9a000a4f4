"""Every token is learned once, from what precedes it in its own document, in batches of one shape."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.runtime import batches
from shallowflow.runtime.batches import Window
from shallowflow.runtime.documents import Document
from shallowflow.runtime.loss import IGNORED_LABEL
from tests.runtime import tiny

FIRST_LETTER = 1000
START, END = 1, 2


@dataclass(frozen=True)
class Letters:
    """A tokenizer that numbers letters by their code point."""

    eos_token_id: int | None = END
    add_bos_token: bool = False
    bos_token_id: int = START

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        start = [self.bos_token_id] if self.add_bos_token and _options.get("add_special_tokens", True) else []
        return {"input_ids": [*start, *(ord(letter) for letter in text)]}

    def tokens(self, document: Document) -> tuple[list[int], int]:
        """All tokens of *document* as they should be read, and how many of them come before what is learned."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [] if self.eos_token_id is None else [self.eos_token_id]
        whole = [*start, *map(ord, document.prompt + document.text), *end]
        return whole, len(start) + len(document.prompt)


TOKENIZERS = st.builds(Letters, st.sampled_from([END, None]), st.booleans())
LENGTHS = st.integers(2, 12)


@st.composite
def distinct_documents(draw: st.DrawFn) -> list[Document]:
    """Documents in which no letter occurs twice, so that every token tells where it came from."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=5))
    letters = map(chr, itertools.count(FIRST_LETTER))
    return [Document(prompt=_take(letters, before), text=_take(letters, after)) for before, after in sizes]


def _take(letters: Iterator[str], count: int) -> str:
    return "".join(itertools.islice(letters, count))


def numbered(count: int) -> list[Window]:
    """Windows that can be told apart."""
    return [Window(input_ids=(i, i), labels=(i, IGNORED_LABEL), num_targets=1) for i in range(count)]


def is_padding(label: int) -> bool:
    return label == IGNORED_LABEL


# Windows


@given(documents=distinct_documents(), tokenizer=TOKENIZERS, length=LENGTHS)
def test_every_target_is_learned_once(documents: list[Document], tokenizer: Letters, length: int) -> None:
    """Each token of each text is learned exactly once, from the token before it, and nothing else is learned."""
    found = batches.windows(documents, tokenizer, length)

    expected: Counter[tuple[int, int]] = Counter()
    for document in documents:
        tokens, num_read = tokenizer.tokens(document)
        expected.update(itertools.islice(itertools.pairwise(tokens), max(0, num_read - 1), None))
    learned = Counter(
        pair for w in found for pair in zip(w.input_ids, w.labels, strict=True) if not is_padding(pair[1])
    )
    assert learned == expected
    assert [w.num_targets for w in found] == [sum(not is_padding(label) for label in w.labels) for w in found]


@given(documents=distinct_documents(), tokenizer=TOKENIZERS, length=LENGTHS)
def test_a_window_is_a_slice_of_one_document(documents: list[Document], tokenizer: Letters, length: int) -> None:
    """A window reads consecutive tokens of a single document, then padding on the right that is not learned."""
    streams = [tokenizer.tokens(document)[0] for document in documents]
    for w in batches.windows(documents, tokenizer, length):
        assert len(w.input_ids) == len(w.labels) == length

        num_read = max(i for i, label in enumerate(w.labels) if not is_padding(label)) + 1
        read = list(w.input_ids[:num_read])
        assert any(read == stream[i : i + num_read] for stream in streams for i in range(len(stream)))


@given(documents=distinct_documents(), tokenizer=TOKENIZERS, length=LENGTHS)
def test_documents_do_not_shape_each_other(documents: list[Document], tokenizer: Letters, length: int) -> None:
    """All documents together give the windows that each gives alone."""
    together = batches.windows(documents, tokenizer, length)

    assert together == [w for d in documents for w in batches.windows([d], tokenizer, length)]


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    """The real model's logits of a text are the same with padding after it and without."""
    model = tiny.base()
    padded = batches.micro_batch([tiny.window(range(40, 50), length=30)], tiny.CPU).input_ids

    with torch.no_grad():
        with_padding, without = model(input_ids=padded).logits, model(input_ids=padded[:, :9]).logits

    torch.testing.assert_close(with_padding[:, :9], without)


@pytest.mark.parametrize("neighbour", [range(100, 117), range(200, 205)], ids=["long", "short"])
def test_one_document_does_not_change_the_loss_of_another(neighbour: Sequence[int]) -> None:
    """In the real model, two documents in a batch have the sum of the losses that they have alone."""
    trainee = tiny.trainee()
    pair = [tiny.window(neighbour), tiny.window(range(40, 52))]

    with torch.no_grad():
        together = trainee.loss(batches.micro_batch(pair, tiny.CPU))
        alone = [trainee.loss(batches.micro_batch([w], tiny.CPU)) for w in pair]

    torch.testing.assert_close(together, alone[0] + alone[1])


# Steps


@given(
    num_windows=st.integers(1, 20),
    micro_batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    seed=st.integers(),
)
def test_an_epoch_sees_every_window_once(num_windows: int, micro_batch_size: int, accumulation: int, seed: int) -> None:
    """All batches have one shape, and read in order they are one permutation of the data after another."""
    every = numbered(num_windows)
    per_step = micro_batch_size * accumulation
    num_steps = -(-3 * num_windows // per_step)

    taken = list(itertools.islice(batches.steps(every, micro_batch_size, accumulation, seed), num_steps))

    assert {(len(step), *map(len, step)) for step in taken} == {(accumulation, *[micro_batch_size] * accumulation)}
    stream = [w.input_ids[0] for step in taken for chosen in step for w in chosen]
    for epoch in range(3):
        assert sorted(stream[epoch * num_windows : (epoch + 1) * num_windows]) == list(range(num_windows))


@given(seed=st.integers(0, 2**32))
def test_the_seed_decides_the_order(seed: int) -> None:
    """The same seed gives the same batches, another seed and the next epoch other ones."""
    every = numbered(50)
    first, again, other = (batches.steps(every, 5, 10, s) for s in (seed, seed, seed + 1))

    epoch = next(first)
    assert epoch == next(again)
    assert epoch != next(other)
    assert epoch != next(first)


def test_a_micro_batch_stacks_its_windows() -> None:
    """Tokens and labels keep their places, and the targets of all windows are counted."""
    chosen = [tiny.window(range(5), length=6), tiny.window(range(7), length=6)]

    made = batches.micro_batch(chosen, "cpu")

    assert made.input_ids.tolist() == [list(w.input_ids) for w in chosen]
    assert made.labels.tolist() == [list(w.labels) for w in chosen]
    assert made.num_targets == 4 + 6
