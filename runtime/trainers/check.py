"""Whether a trainer's settings will do on a GPU: its own step simulated, its traps, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shallowflow.planner.memory_record import CategoryBytes
from shallowflow.planner.profiler.user_step import simulate_accumulated
from shallowflow.profiles import GpuSpec, ModelSpec, model_facts

from . import resolve, traps
from .findings import Finding
from .settings import DTYPES, TITLES, Quantized, Settings, is_any
from .steps import make_step

FORMAT_VERSION = 1
WORTH_TRYING = 0.8
"""Of the memory: where weights in 16 bits would take more, they are not tried in place of quantized ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one optimizer update is predicted to take.

    Attributes:
        peak_phase, peak_module: where the peak is.
        step_seconds: of all its micro-batches.
        categories: of the process's memory at the peak; they sum to ``peak_process_bytes``.
    """

    peak_process_bytes: int
    peak_phase: str
    peak_module: str
    step_seconds: float
    tokens_per_second: float
    categories: tuple[CategoryBytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is said of a trainer's settings on one GPU.

    Attributes:
        memory_bytes: the GPU's.
        corrected: settings without the traps, that fit; None if there are none, or nothing is to be changed.
        remaining: traps that the corrected settings still walk into, as the tool cannot say better.
        notes: what the prediction leaves out.
    """

    format_version: int
    model: str
    gpu: str
    memory_bytes: int
    settings: Settings
    outcome: Outcome
    findings: tuple[Finding, ...]
    corrected: Settings | None
    corrected_outcome: Outcome | None
    remaining: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory is enough."""
        return self.outcome.peak_process_bytes <= self.memory_bytes

    @property
    def will_run(self) -> bool:
        """Whether it fits, and nothing else makes it fail."""
        return self.fits and not any(finding.severity == "fails" for finding in self.findings)


def predict(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Outcome:
    """Simulate *settings* on a model of *config*: one micro-batch and the update, and the time of all micro-batches."""
    steps = settings.gradient_accumulation_steps
    record, update_seconds = simulate_accumulated(make_step(settings, config, gpu.device_type), gpu)
    assert record.step_seconds is not None
    seconds = update_seconds + (record.step_seconds - update_seconds) * steps
    tokens = steps * settings.micro_batch_size * settings.sequence_length
    return Outcome(
        peak_process_bytes=record.peak_process_bytes,
        peak_phase=record.peak_phase,
        peak_module=record.peak_module,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        categories=record.categories,
    )


def check(
    settings: Settings, model: ModelSpec, gpu: GpuSpec, progress: Callable[[str], None] = lambda _said: None
) -> Verdict:
    """Say of *settings* whether they will do on *gpu*, and correct them.

    Raises:
        BadFacts: the model cannot be built.
    """
    assumed = settings.weights_dtype == "auto"
    settings = resolve.resolved(settings, model.config)
    progress("its own step")
    outcome = predict(settings, model.config, gpu)
    findings = traps.found(settings, model.config, gpu)
    corrected, better = _corrected(settings, outcome, model, gpu, progress)
    if corrected is not None and better is not None and settings.quantization != "none":
        plain, faster = _unquantized(corrected, better, model, gpu, progress)
        if plain is not None and faster is not None:
            findings = (*findings, _needless(settings, better, faster))
            corrected, better = plain, faster
    changed = corrected is not None and corrected != settings
    return Verdict(
        format_version=FORMAT_VERSION,
        model=model.name,
        gpu=gpu.name,
        memory_bytes=gpu.memory_bytes,
        settings=settings,
        outcome=outcome,
        findings=findings,
        corrected=corrected if changed else None,
        remaining=traps.found(corrected, model.config, gpu) if changed and corrected is not None else (),
        corrected_outcome=better if changed else None,
        notes=(*_length(settings, model), *_notes(settings, assumed=assumed)),
    )


def _corrected(
    settings: Settings, outcome: Outcome, model: ModelSpec, gpu: GpuSpec, progress: Callable[[str], None]
) -> tuple[Settings | None, Outcome | None]:
    """The first of ever leaner settings without traps that fits, as simulated."""

    def found(candidate: Settings) -> Outcome:
        progress(f"corrected: {candidate.micro_batch_size} at once, weights in {candidate.quantization}")
        return outcome if candidate == settings else predict(candidate, model.config, gpu)

    candidates = list(leaner(replace(settings, **traps.mended(settings, model.config, gpu))))
    fitting = first_fitting(candidates, found, gpu.memory_bytes)
    return (None, None) if fitting is None else fitting


def first_fitting(
    candidates: Sequence[Settings], predicted: Callable[[Settings], Outcome], most_bytes: int
) -> tuple[Settings, Outcome] | None:
    """The first of *candidates*, each leaner than those before it, whose peak is no more; None if the last one's is.

    Few are predicted: the first, the last, and what halves those in between.
    """
    known: dict[int, Outcome] = {}

    def fits(index: int) -> bool:
        known[index] = predicted(candidates[index])
        return known[index].peak_process_bytes <= most_bytes

    last = len(candidates) - 1
    if fits(0):
        return candidates[0], known[0]
    if last == 0 or not fits(last):
        return None
    low, high = 0, last  # the one does not fit, the other does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return candidates[high], known[high]


def leaner(settings: Settings) -> Iterator[Settings]:
    """*settings*, and what to give up of them in turn: speed by recomputation, then batches, then bits."""
    yield settings
    if not settings.recomputes:
        settings = replace(settings, recomputes=True)
        yield settings
    while settings.micro_batch_size % 2 == 0:
        settings = replace(
            settings,
            micro_batch_size=settings.micro_batch_size // 2,
            gradient_accumulation_steps=settings.gradient_accumulation_steps * 2,
        )
        yield settings
    if settings.micro_batch_size > 1:
        settings = replace(
            settings,
            micro_batch_size=1,
            gradient_accumulation_steps=settings.gradient_accumulation_steps * settings.micro_batch_size,
        )
        yield settings
    if settings.adapter == "full":
        return
    coarser: dict[Quantized, tuple[Quantized, ...]] = {"none": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}
    for quantization in coarser[settings.quantization]:
        yield replace(
            settings,
            quantization=quantization,
            double_quantization=quantization == "nf4",
            product_dtype=DTYPES[settings.precision],
        )


def _unquantized(
    settings: Settings, outcome: Outcome, model: ModelSpec, gpu: GpuSpec, progress: Callable[[str], None]
) -> tuple[Settings | None, Outcome | None]:
    """The same without quantization, if it fits and is faster."""
    if model.num_parameters is None or 2 * model.num_parameters > WORTH_TRYING * gpu.memory_bytes:
        return None, None
    progress("without quantization")
    plain = replace(settings, quantization="none", double_quantization=False)
    found = predict(plain, model.config, gpu)
    better = found.peak_process_bytes <= gpu.memory_bytes and found.step_seconds < outcome.step_seconds
    return (plain, found) if better else (None, None)


def _needless(settings: Settings, quantized: Outcome, plain: Outcome) -> Finding:
    return Finding(
        trap="needless quantization",
        severity="slow",
        where=settings.said("quantization"),
        what=(
            f"{settings.quantization} saves memory and not time: weights in 16 bits fit, and make a step "
            f"{1 - plain.step_seconds / quantized.step_seconds:.0%} shorter"
        ),
        instead="no quantization",
    )


def _length(settings: Settings, model: ModelSpec) -> tuple[str, ...]:
    longest, asked = model_facts.size(model.config, "max_position_embeddings"), settings.sequence_length
    if longest is None or asked <= longest:
        return ()
    return (f"Sequences of {asked:,} tokens are more than the {longest:,} that the model was built for.",)


def _notes(settings: Settings, *, assumed: bool) -> tuple[str, ...]:
    notes = [
        f"{key} is nothing that {TITLES[settings.tool]} is known to read; if {meant} is meant, it counts as not given."
        for key, meant in settings.misspelled.items()
    ]
    notes += settings.inert
    if assumed:
        notes.append(f"The checkpoint's own dtype is counted as {settings.weights_dtype}.")
    if settings.tool == "unsloth":
        notes.append("Unsloth's own kernels and its offloading of layers' inputs hold less than this: an upper bound.")
    if settings.tool == "axolotl" and settings.adapter != "full":
        notes.append("axolotl's LoRA kernels hold fewer activations than PEFT's layers: an upper bound.")
    if "paged" in settings.optimizer:
        notes.append("A paged optimizer's state may leave the GPU; it is counted as on it.")
    if not is_any(settings.optimizer, ("adamw", "adam_")):
        notes.append(f"The optimizer {settings.optimizer} is counted as AdamW.")
    if settings.shards:
        notes.append(f"{settings.shards} is not simulated: every GPU is counted with the whole model.")
    if settings.loss == "fused":
        notes.append("Of Liger's kernels the loss alone is simulated.")
    return tuple(notes)
