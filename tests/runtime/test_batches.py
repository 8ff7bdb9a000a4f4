"""Every token is learned once, from what precedes it in its own document, in batches no longer than planned."""

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

from shallowflow.planner.packing import first_fit_decreasing
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


def numbered(lengths: Sequence[int]) -> list[Window]:
    """Windows of these lengths that can be told apart by any of their tokens."""
    return [Window(input_ids=(i,) * n, labels=(i,) * n, num_targets=n) for i, n in enumerate(lengths)]


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
    """A window reads consecutive tokens of one document, no more than the sequence length, and holds no padding."""
    streams = [tokenizer.tokens(document)[0] for document in documents]
    for w in batches.windows(documents, tokenizer, length):
        assert 1 <= len(w.input_ids) == len(w.labels) <= length
        assert any(
            list(w.input_ids) == stream[i : i + len(w.input_ids)] for stream in streams for i in range(len(stream))
        )


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


# Packing

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@given(lengths=SIZES, capacity=st.integers(20, 64))
def test_packing_keeps_every_window_whole(lengths: list[int], capacity: int) -> None:
    """No token is lost or doubled, no window straddles sequences, none is too long, and there are no more of them."""
    every = numbered(lengths)
    found = batches.packed(every, capacity)

    inside: list[int] = []
    for sequence in found:
        assert sum(sequence.packed) == len(sequence.input_ids) <= capacity
        assert sequence.labels == sequence.input_ids and sequence.num_targets == len(sequence.labels)
        places = itertools.accumulate(sequence.packed, initial=0)
        parts = [sequence.input_ids[first:last] for first, last in itertools.pairwise(places)]
        assert all(len(set(part)) == 1 and len(part) == lengths[part[0]] for part in parts)
        inside += [part[0] for part in parts]
    assert sorted(inside) == list(range(len(lengths)))
    assert -(-sum(lengths) // capacity) <= len(found) <= len(every)
    assert found == batches.packed(every, capacity)


@given(lengths=SIZES, capacity=st.integers(20, 64))
def test_packing_takes_the_first_place_with_room(lengths: list[int], capacity: int) -> None:
    """The sequences are those of first-fit decreasing, done the slow way."""
    expected: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = (chosen for chosen in expected if sum(lengths[i] for i in chosen) + lengths[number] <= capacity)
        chosen = next(room, None)
        if chosen is None:
            expected.append([number])
        else:
            chosen.append(number)

    assert first_fit_decreasing(lengths, capacity) == expected


def test_positions_begin_anew_with_each_window() -> None:
    """In a packed micro-batch each window, and the padding, counts from 0; without packing there are no positions."""
    every = numbered([3, 2, 4, 1])

    made = batches.micro_batch(batches.packed(every, 6), "cpu", 8)

    assert made.position_ids is not None
    assert made.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 2, 0, 0, 1, 2, 3]]
    assert made.input_ids[:, :6].tolist() == [[2, 2, 2, 2, 1, 1], [0, 0, 0, 3, 0, 0]]
    assert [int((row != IGNORED_LABEL).sum()) for row in made.labels] == [6, 4]
    assert batches.micro_batch(every, "cpu").position_ids is None


# Steps


@given(lengths=SIZES, micro_batch_size=st.integers(1, 5), accumulation=st.integers(1, 4), seed=st.integers())
def test_an_epoch_sees_every_window_once(
    lengths: list[int], micro_batch_size: int, accumulation: int, seed: int
) -> None:
    """All steps have as many windows, and those of successive steps are one permutation of the data after another."""
    every = numbered(lengths)
    per_step = micro_batch_size * accumulation
    num_steps = -(-3 * len(lengths) // per_step)

    taken = list(itertools.islice(batches.steps(every, micro_batch_size, accumulation, 20, seed), num_steps))

    assert {(len(step), *(len(group.windows) for group in step)) for step in taken} == {
        (accumulation, *[micro_batch_size] * accumulation)
    }
    seen = Counter(w.input_ids[0] for step in taken for group in step for w in group.windows)
    rounds, rest = divmod(num_steps * per_step, len(lengths))
    assert set(seen.values()) <= {rounds, rounds + 1} and seen.total() == rounds * len(lengths) + rest
    for done in range(len(lengths) // per_step):
        early = [w.input_ids[0] for step in taken[: done + 1] for group in step for w in group.windows]
        assert len(set(early)) == len(early)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    micro_batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    seed=st.integers(),
)
def test_no_shape_exceeds_the_planned_one(
    lengths: list[int], micro_batch_size: int, accumulation: int, seed: int
) -> None:
    """The first two steps have the planned length; later micro-batches the next multiple of 64 that holds the longest.

    Their longest come in order, and no other way to cut a step gives shorter micro-batches.
    """
    planned = 300
    endless = batches.steps(numbered(lengths), micro_batch_size, accumulation, planned, seed)

    for number, step in enumerate(itertools.islice(endless, 6)):
        longest = [max(len(w.input_ids) for w in group.windows) for group in step]
        expected = [min(planned, -(-n // 64) * 64) for n in longest] if number >= 2 else [planned] * accumulation
        assert [group.length for group in step] == expected
        inside = sorted((len(w.input_ids) for group in step for w in group.windows), reverse=True)
        assert longest == inside[::micro_batch_size]


@given(seed=st.integers(0, 2**32))
def test_the_seed_decides_the_order(seed: int) -> None:
    """The same seed gives the same batches, another seed and the next epoch other ones."""
    every = numbered([2] * 50)
    first, again, other = (batches.steps(every, 5, 10, 2, s) for s in (seed, seed, seed + 1))

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


def test_the_first_steps_from_anywhere_are_whole() -> None:
    """Two steps from *first_whole* on have the planned length, whatever their windows; the others are trimmed."""
    every = [tiny.window(range(5)) for _ in range(8)]
    every = [batches.Window(w.input_ids[:4], w.labels[:4], 4) for w in every]

    lengths = [
        [group.is_whole for group in groups]
        for groups in itertools.islice(batches.steps(every, 2, 1, 256, seed=0, first_whole=3), 6)
    ]

    assert lengths == [[False], [False], [False], [True], [True], [False]]
