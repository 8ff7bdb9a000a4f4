"""What a run came to, as a terminal or a notebook shows it; loads no torch."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shallowflow.planner import words

from .fallback import told
from .record import RunRecord
from .report import row


def outcome(record: RunRecord) -> RenderableType:
    """What was learned, how fast, what else a person should know, and predicted beside measured."""
    lines = [Text(f"{record.model_name}: {record.outcome}, {words.counted(len(record.steps), 'step')}", style="bold")]
    if record.perplexity_before is not None and record.perplexity_after is not None:
        lines.append(
            Text(f"perplexity on held-out text  {record.perplexity_before:.2f} -> {record.perplexity_after:.2f}")
        )
    rate = record.tokens_per_second
    spent = "" if record.usd is None else f", ${record.usd:.4f}"
    learned_at = "" if rate is None else f"{rate:,.0f} tokens/s learned, "  # too few steps tell no rate
    if record.steps:
        lines.append(Text(f"{learned_at}{words.duration(record.seconds)} in all{spent}"))
    lines += [Text(line) for line in _told(record)]
    compared: list[RenderableType] = [Text(), _comparisons(record), Text()] if record.comparisons else []
    return Group(*lines, *compared)


def learned(record: RunRecord) -> str:
    """What was: an adapter or the model."""
    return "model" if record.configuration is not None and record.configuration.is_full else "adapter"


def _comparisons(record: RunRecord) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("predicted and measured")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    for comparison in record.comparisons:
        table.add_row(*row(comparison))
    return table


def _told(record: RunRecord) -> list[str]:
    """Everything else that a person should know of a run."""
    found = []
    if record.best_step is not None:
        best = f"the best of {len(record.evaluations)} evaluated, after step {record.best_step}"
        found.append(f"the {learned(record)} is {best}")
    found += [told(fallback) for fallback in record.fallbacks]
    found += [*record.notes, *record.causes]
    for sample in record.samples:
        found.append(f"sample  {sample.prompt}")
        found += [f"  {when}  {text}" for when, text in (("before", sample.before), ("after ", sample.after)) if text]
    return found
