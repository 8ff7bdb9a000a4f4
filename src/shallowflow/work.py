"""The size of the work: given in tokens, or read from data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format


def path_of(name: str, given: object) -> Path | None:
    """The path that an argument called *name* gives.

    Raises:
        RequestError: it is none.
    """
    if given is not None and not isinstance(given, (str, Path)):
        raise RequestError(f"{name} is {type(given).__name__}; give the path of a file, or hf:ORG/NAME")
    return None if given is None else Path(given)


def size_of_work(
    model: tuple[str, str],
    tokens: int | None,
    data: Path | None,
    eval_data: Path | None,
    data_format: Format | None,
    sequence_length: int,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is known of the work: fields of a workload, and notes on where they come from.

    *model* is as it was asked for, and its name: data is counted with its tokenizer, if that is on this machine.

    Raises:
        RequestError: the size is given twice.
        DataError, WeightsError: the data, or the tokenizer beside a model, cannot be read.
    """
    if tokens is not None and data is not None:
        raise RequestError("the size is given twice; give either --tokens (total_tokens in Python) or --data, not both")
    if data is None and data_format is not None and eval_data is None:
        raise RequestError("--data-format says how --data is read; give --data, too")
    _check_format(data_format)
    given: dict[str, Any] = {"total_tokens": tokens} if tokens else {}
    if data is None and eval_data is None:
        return given, ()
    from shallowflow.planner.packing import first_fit_decreasing, window_counts
    from shallowflow.runtime.documents import CHARACTERS_PER_TOKEN, read_documents
    from shallowflow.runtime.lengths import document_lengths
    from shallowflow.runtime.local_tokenizer import local_tokenizer

    learned = read_documents(data, data_format) if data else []
    held_out = read_documents(eval_data, data_format) if eval_data else []
    tokenizer = local_tokenizer(*model)
    if held_out:
        given["num_eval_sequences"] = document_lengths(held_out, tokenizer).num_sequences(sequence_length)
    if data is None:
        return given, ()
    lengths = document_lengths(learned, tokenizer)
    windows = lengths.windows(sequence_length) or [1]
    sequences, total = len(windows), max(1, lengths.num_tokens)
    if lengths.exact:
        how = f"{total:,} tokens in {sequences:,} windows of documents, counted by the model's tokenizer"
    else:
        how = (
            f"about {total:,} tokens in {sequences:,} windows of documents, estimated at "
            f"{CHARACTERS_PER_TOKEN} characters per token"
        )
    note = f"{data.name}: {how}; the hours follow from it."
    found = {
        "total_tokens": total,
        "num_sequences": sequences,
        "num_packed_sequences": len(first_fit_decreasing(windows, sequence_length)),
        "window_counts": window_counts(windows, sequence_length),
    }
    return {**given, **found}, (note,)


def _check_format(data_format: str | None) -> None:
    """RequestError where there is no such format."""
    if data_format is None:
        return
    from shallowflow.runtime.documents import FORMATS

    if data_format not in FORMATS:
        raise RequestError(f"data_format is {data_format!r}; give one of {', '.join(FORMATS)}")
