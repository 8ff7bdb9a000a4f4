"""``sfplan data``: what a data file holds, before anything is planned or trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shallowflow.printing import echo_json

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Data, Format
    from shallowflow.runtime.lengths import Lengths

WIDTH = 80
BAR = "█"
MOST_COLUMNS = 5
FORMAT_NAMES = ("messages", "sharegpt", "alpaca", "text", "prompt-completion")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """What a data file holds.

    Attributes:
        kind: of file, such as ``JSONL``.
        formats: of its rows; two only where text and prompts mix.
        num_rows: with those that have nothing to learn.
        num_documents: those with something to learn.
        ignored_columns: that the rows have and their format does not.
        exact: whether tokens were counted by the model's tokenizer, or estimated from characters.
        num_tokens: of all documents.
        num_learned_tokens: those that are targets.
        document_tokens: each document's, in order.
    """

    kind: str
    formats: tuple[str, ...]
    num_rows: int
    num_documents: int
    ignored_columns: tuple[str, ...]
    exact: bool
    num_tokens: int
    num_learned_tokens: int
    document_tokens: tuple[int, ...]


def data_format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """How rows are read, where their columns do not say it well."""
    option = click.option(
        "--data-format",
        type=click.Choice(FORMAT_NAMES),
        help="How rows of data are read.  [default: told from their columns]",
    )
    return option(command)


@click.command("data")
@click.argument("data", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--model", help="Count with this model's tokenizer, if it is on this machine.")
@data_format_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON, with every document's length.")
def data_command(data: Path, model: str | None, data_format: Format | None, as_json: bool) -> None:
    """Say what FILE holds: its format, how many tokens, how many of them are learned, how long documents are.

    FILE is JSONL, JSON, CSV, Parquet or plain text, or a dataset, as hf:ORG/NAME or hf:ORG/NAME:SPLIT.

    \b
    sfplan data train.jsonl
    sfplan data train.jsonl --model SmolLM2-135M-Instruct
    sfplan data train.jsonl --data-format text --json
    """
    from shallowflow.runtime.documents import read_data
    from shallowflow.runtime.lengths import document_lengths

    read = read_data(data, data_format)
    tokenizer = None
    if model is not None:
        from shallowflow.hub import find_model
        from shallowflow.runtime.local_tokenizer import local_tokenizer

        tokenizer = local_tokenizer(model, find_model(model).name)
    lengths = document_lengths(read.documents, tokenizer)
    if as_json:
        echo_json(_facts(read, lengths))
        return
    click.echo("\n".join(_shown(data, read, lengths)))


def _facts(read: Data, lengths: Lengths) -> DataFacts:
    return DataFacts(
        kind=read.kind,
        formats=read.formats,
        num_rows=read.num_rows,
        num_documents=len(read.documents),
        ignored_columns=tuple(name.encode(errors="backslashreplace").decode() for name in read.ignored),
        exact=lengths.exact,
        num_tokens=lengths.num_tokens,
        num_learned_tokens=lengths.num_learned,
        document_tokens=tuple(document.num_tokens for document in lengths.documents),
    )


def _shown(path: Path, read: Data, lengths: Lengths) -> Iterator[str]:
    from shallowflow.runtime.documents import CHARACTERS_PER_TOKEN

    sizes = sorted(document.num_tokens for document in lengths.documents)
    how = "counted by the model's tokenizer" if lengths.exact else f"at {CHARACTERS_PER_TOKEN} characters per token"
    left_out = read.num_rows - len(read.documents)
    yield f"{path}: {read.kind}, {' and '.join(read.formats)}"
    yield f"documents  {len(sizes):,}" + (f", and {left_out:,} rows with nothing to learn" if left_out else "")
    if read.ignored:
        yield f"ignored    {listed(read.ignored)}, which {' and '.join(read.formats)} rows do not have"
    yield f"tokens     {'' if lengths.exact else 'about '}{lengths.num_tokens:,}, {how}"
    yield f"learned    {lengths.num_learned / max(1, lengths.num_tokens):.1%} of them"
    yield f"longest    {sizes[-1]:,} tokens; half of the documents have {sizes[(len(sizes) - 1) // 2]:,} or fewer"
    yield ""
    yield from histogram(sizes)


def listed(columns: Sequence[str]) -> str:
    """The names of some columns, and how many more there are."""
    more = len(columns) - MOST_COLUMNS
    shown = ", ".join(repr(column) for column in columns[:MOST_COLUMNS])
    return f"{'columns' if len(columns) > 1 else 'column'} {shown}" + (f" and {more} more" if more > 0 else "")


def histogram(sizes: Sequence[int]) -> list[str]:
    """Documents by their tokens, each row twice as wide as the one above, with the share that is no longer."""
    bins = Counter((max(1, size) - 1).bit_length() for size in sizes)
    rows, so_far = [], 0
    for power in range(min(bins), max(bins) + 1):
        so_far += bins[power]
        least = 1 if power == 0 else 2 ** (power - 1) + 1
        name = f"{least:,}-{2**power:,}" if least < 2**power else f"{least}"
        rows.append((name, f"{bins[power]:,}", f"{so_far / len(sizes):.1%}", bins[power]))
    heads = ("tokens", "documents", "no longer")
    widths = [max(len(head), *(len(str(row[i])) for row in rows)) for i, head in enumerate(heads)]
    room = WIDTH - sum(widths) - 2 * len(widths)
    most = max(bins.values())
    lines = ["  ".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
    for *cells, count in rows:
        bar = BAR * (max(1, room * count // most) if count else 0)
        lines.append("  ".join([*(str(c).rjust(w) for c, w in zip(cells, widths, strict=True)), bar]).rstrip())
    return lines
