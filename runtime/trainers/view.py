"""A verdict as a person reads it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shallowflow.planner import words
from shallowflow.profiles import GpuSpec

from .check import Outcome, Verdict
from .findings import a
from .settings import TITLES, Settings

_COLOURS = {"fails": "bold red", "wrong": "red", "slow": "yellow", "late": "cyan"}
_SHOWN = (
    "precision",
    "quantization",
    "weights_dtype",
    "product_dtype",
    "attention",
    "loss",
    "packing",
    "longest_first",
    "recomputes",
    "micro_batch_size",
    "gradient_accumulation_steps",
)


def shown(verdict: Verdict, gpu: GpuSpec) -> RenderableType:
    """The answer first; then traps, what to write instead, and what that would take."""
    settings, outcome = verdict.settings, verdict.outcome
    parts: list[RenderableType] = [
        Text(f"{verdict.model} with {TITLES[settings.tool]} on {a(gpu)}", style="bold"),
        _answer(verdict),
        Text(f"at the peak: {outcome.peak_phase}{_in(outcome)}; {_largest(outcome)}"),
        Text(f"a step: {_step(outcome)}, {outcome.tokens_per_second:,.0f} tokens/s"),
    ]
    if verdict.findings:
        parts += [Text(), _findings(verdict)]
    if verdict.corrected is not None and verdict.corrected_outcome is not None:
        parts += [Text(), *_corrected(verdict, verdict.corrected, verdict.corrected_outcome)]
    elif not verdict.will_run:
        what = "corrected, it does not fit" if verdict.fits else "nothing like it fits"
        bits = "" if settings.adapter == "full" else ", in 4 bits"
        parts += [Text(), Text(f"{what}: not with one sequence at once, recomputed{bits}", style="bold")]
    command = f"sfplan {verdict.model} --gpu {gpu.name} --sequence-length {settings.sequence_length}"
    batch = settings.micro_batch_size * settings.gradient_accumulation_steps
    parts += [Text(), Text(f"What would be best: {command} --global-batch-size {batch}")]
    parts += [Text(note, style="dim") for note in verdict.notes]
    return Group(*parts)


def _answer(verdict: Verdict) -> Text:
    peak, memory = verdict.outcome.peak_process_bytes, verdict.memory_bytes
    if verdict.fits:
        said = f"fits: {words.gib(peak)} of {words.gib(memory)}"
        failing = [finding.trap for finding in verdict.findings if finding.severity == "fails"]
        if not failing:
            return Text(said, style="bold green")
        return Text(f"{said}, but fails: {', '.join(failing)}", style="bold red")
    return Text(f"does not fit: {words.gib(peak)}, {words.gib(peak - memory)} too much", style="bold red")


def _in(outcome: Outcome) -> str:
    return f", in {outcome.peak_module}" if outcome.peak_module else ""


def _largest(outcome: Outcome) -> str:
    largest = sorted(outcome.categories, key=lambda one: -one.num_bytes)[:3]
    return ", ".join(f"{one.category} {words.gib(one.num_bytes)}" for one in largest)


def _step(outcome: Outcome) -> str:
    return words.duration(outcome.step_seconds)


def _findings(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in verdict.findings:
        table.add_row(
            Text(finding.severity, style=_COLOURS[finding.severity]),
            Text.assemble(
                (finding.trap, "bold"), f"  {finding.where}\n{finding.what}\n", ("instead: ", "bold"), finding.instead
            ),
        )
    return table


def _corrected(verdict: Verdict, corrected: Settings, outcome: Outcome) -> list[RenderableType]:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name in _SHOWN:
        before, after = getattr(verdict.settings, name), getattr(corrected, name)
        if before != after:
            table.add_row(Text(name.replace("_", " ")), Text(f"{_plain(before)} -> {_plain(after)}"))
    said = f"corrected: {words.gib(outcome.peak_process_bytes)}, {_step(outcome)} a step"
    faster = verdict.outcome.step_seconds / outcome.step_seconds
    if faster > 1.05:
        said += f", {faster:.1f} times as fast"
    parts: list[RenderableType] = [Text(said, style="bold"), table]
    before = {finding.trap for finding in verdict.findings}
    stays = [finding.trap for finding in verdict.remaining if finding.trap in before]
    comes = [finding for finding in verdict.remaining if finding.trap not in before]
    if stays:
        parts.append(Text(f"what stays: {', '.join(stays)}"))
    parts += [Text(f"what comes with it: {finding.trap}; instead: {finding.instead}") for finding in comes]
    return parts


def _plain(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
