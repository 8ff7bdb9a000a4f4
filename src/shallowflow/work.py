"""The size of the work: given in tokens, or read from data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format


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
