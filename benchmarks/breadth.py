"""Which architectures can be traced: a small model of every causal language model that transformers can build.

    python -m benchmarks.breadth [--json] [--markdown FILE] [NAME...]

Each takes three training steps on ``meta`` as on a T4, once with all its weights learning and once with LoRA on its
linear layers. It counts as traced if forward pass, backward pass and optimizer were all seen to allocate, and some
parameters got gradients. One that fails says why, and the others go on.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import small_models
from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles import GpuSpec, load_gpu
from shallowflow.runtime import build
from shallowflow.runtime.silence import silenced
from shallowflow.runtime.simulated import register_quantization

GPU = "t4"
BATCH = (2, 32)
KINDS = ("full", "LoRA")
PHASES = {"forward", "backward", "optimizer"}

REASONS = {
    "gemma3n": "its vision tower needs the timm package; the text model by itself, gemma3n_text, is traced",
    "gemma4_assistant": "takes the keys and values of the model that it assists, and no labels",
    "gemma4_unified_assistant": "takes the keys and values of the model that it assists, and no labels",
}
"""Why these cannot be traced by themselves, said better than by the exception."""

NOTES = {
    "git": "behind an image",
    "musicgen": "its decoder",
    "musicgen_melody": "its decoder",
    "reformer": "LoRA with gradients for the embeddings, which its reversible layers need",
    "xlstm": "in float32",
}
"""How these were traced, where not as the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one architecture, trained in one way.

    Attributes:
        kind: ``full`` or ``LoRA``.
        error: why it was not traced, or nothing.
        num_parameters: of the small model, adapters left out.
        num_learning: parameters that a gradient reached, adapters among them.
        resident_bytes: between two steps, 0 if not traced.
        peak_bytes: the most that is allocated at once, 0 if not traced.
        seconds: taken to build and trace it.
    """

    model_type: str
    kind: str
    error: str
    num_parameters: int
    num_learning: int
    resident_bytes: int
    peak_bytes: int
    seconds: float


def make_step_of(
    model_type: str, kind: str, compute_dtype: str, reached: dict[int, int] | None = None
) -> Callable[[str], Callable[[], None]]:
    """The training step of a small model, as a function of the device.

    *reached* is filled with the sizes of the parameters that got a gradient.
    """
    reached = {} if reached is None else reached

    def make_step(device: str) -> Callable[[], None]:
        torch.manual_seed(0)
        plain = small_models.small_model(model_type, compute_dtype, device)
        model = adapted(plain) if kind == "LoRA" else plain
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        batch = small_models.batch(model_type, plain, device, BATCH)

        def step() -> None:
            model(**batch).loss.backward()
            reached.update({n: p.numel() for n, p in enumerate(parameters) if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make_step


def adapted(model: transformers.PreTrainedModel) -> torch.nn.Module:
    """*model* with LoRA on the linear layers of its decoder."""
    if model.config.model_type == "reformer":
        model.enable_input_require_grads()
    return build.add_adapters(model, rank=4, alpha=8)


def compute_dtype_of(model_type: str, gpu: GpuSpec) -> str:
    """What the model computes in on *gpu*."""
    return "float32" if model_type in small_models.FLOAT32 else gpu.compute_dtype


def trace(model_type: str, kind: str, gpu: GpuSpec) -> Outcome:
    """Trace one architecture; whatever goes wrong becomes the outcome's ``error``."""
    start = time.perf_counter()
    dtype, error, num_parameters, resident_bytes, peak_bytes = compute_dtype_of(model_type, gpu), "", 0, 0, 0
    reached: dict[int, int] = {}
    try:
        model = small_models.small_model(model_type, dtype, "meta")
        num_parameters = sum(p.numel() for p in model.parameters())
        record = simulate(make_step_of(model_type, kind, dtype, reached), gpu)
        resident_bytes, peak_bytes = record.resident_bytes, record.peak_allocated_bytes
        missing = PHASES - {phase.phase for phase in record.phases if phase.peak_allocated_bytes}
        error = f"nothing seen of {', '.join(sorted(missing))}" if missing or not reached else ""
    except Exception as failure:  # noqa: BLE001  # one model's failure never stops the others
        error = REASONS.get(model_type, "") or f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    return Outcome(
        model_type=model_type,
        kind=kind,
        error=error,
        num_parameters=num_parameters,
        num_learning=sum(reached.values()),
        resident_bytes=resident_bytes,
        peak_bytes=peak_bytes,
        seconds=round(time.perf_counter() - start, 2),
    )


def outcomes(model_types: Sequence[str]) -> Iterator[tuple[Outcome, Outcome]]:
    """Full fine-tuning and LoRA of every architecture named."""
    gpu = load_gpu(GPU)
    with silenced("transformers"):
        register_quantization()
        for model_type in model_types:
            full, lora = (trace(model_type, kind, gpu) for kind in KINDS)
            yield full, lora


def table(found: Sequence[tuple[Outcome, Outcome]]) -> Table:
    """One row per architecture."""
    made = Table(box=None, pad_edge=False)
    made.add_column("architecture", no_wrap=True)
    for name in ("parameters", "full", "MiB", "s", "LoRA", "MiB", "s"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("note")
    for pair in found:
        made.add_row(pair[0].model_type, f"{pair[0].num_parameters:,}", *_cells(pair), note(pair))
    return made


def _cells(pair: tuple[Outcome, Outcome]) -> Iterator[str]:
    for outcome in pair:
        yield _word(outcome)
        yield "" if outcome.error else f"{outcome.peak_bytes / 2**20:.1f}"
        yield f"{outcome.seconds:.1f}"


def _word(outcome: Outcome) -> str:
    return "no" if outcome.error else "yes"


def note(pair: tuple[Outcome, Outcome]) -> str:
    """Why not, or how."""
    errors = [outcome.error for outcome in pair if outcome.error]
    if errors:
        return errors[0]
    share = pair[0].num_learning / pair[0].num_parameters
    idle = f"text alone reaches {share:.0%} of its weights" if share < 0.9 else ""
    return "; ".join(part for part in (NOTES.get(pair[0].model_type, ""), idle) if part)


def summary(found: Sequence[tuple[Outcome, Outcome]]) -> str:
    """How many were traced."""
    full, lora = (sum(not pair[index].error for pair in found) for index in range(len(KINDS)))
    percent = [f"{math.floor(1000 * traced / len(found)) / 10:.1f} %" for traced in (full, lora)]  # never rounded up
    return f"{full} of {len(found)} traced with all weights learning ({percent[0]}), {lora} with LoRA ({percent[1]})"


def markdown(found: Sequence[tuple[Outcome, Outcome]]) -> str:
    """The page that is published."""
    torch_version = torch.__version__.split("+")[0]
    rows = [f"| {p[0].model_type} | {_word(p[0])} | {_word(p[1])} | {note(p)} |" for p in found]
    return PAGE.format(
        transformers=transformers.__version__,
        torch=torch_version,
        peft=peft.__version__,
        summary=summary(found),
        rows="\n".join(rows),
    )


PAGE = """# Architectures

**{summary}.**

These are all entries of `MODEL_FOR_CAUSAL_LM_MAPPING` in transformers {transformers}, traced with PyTorch {torch} and
PEFT {peft}.

Each was built by its own configuration class, small: few and narrow layers, one of each kind that its default
configuration names, its heads, biases, ties, windows, experts and position encodings as they are by default. Then
`simulate` ran three steps of it on `meta` tensors as on a T4, once with every weight learning and once with LoRA on the
linear layers of its decoder. It counts as traced if the forward pass, the backward pass and the step of AdamW all ran
and gradients arrived. `python -m benchmarks.breadth --markdown docs/architectures.md` writes this page.

What code asks of data is answered without it. A router's choices are spread evenly over its experts, so that what the
experts get adds up to what was chosen; `.item()` says that all is true and nothing overflowed; a mask selects all there
is. Where tokens go elsewhere in reality, an expert has more or fewer of them than its even share.

| architecture | full | LoRA | note |
|---|---|---|---|
{rows}
"""


def main(arguments: Sequence[str]) -> None:
    """Print the table, or JSON, and write the page if one is asked for."""
    words = list(arguments)
    as_json = "--json" in words
    page = Path(words.pop(words.index("--markdown") + 1)) if "--markdown" in words else None
    names = [word for word in words if not word.startswith("--")] or list(small_models.model_types())
    progress: Any = track(
        outcomes(names), "tracing architectures", len(names), console=Console(stderr=True), transient=True
    )
    found: list[tuple[Outcome, Outcome]] = list(progress)
    if as_json:
        print(json.dumps([asdict(outcome) for pair in found for outcome in pair], indent=2))
    else:
        console = Console(width=150)
        console.print(table(found))
        console.print(summary(found))
    if page:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
