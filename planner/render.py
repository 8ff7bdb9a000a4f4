"""A plan as a person reads it: rich renderables, no input or output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .explain import why
from .layer_cost import LayerKind, ModelProfile
from .memory_record import MemoryRecord
from .plan import Candidate, Offer, Plan, Prediction, StepTime, WallTime, Workload
from .strategies import Configuration, Optimizer
from .words import counted, duration, gib, layout, learned, strategies, summary, targets, usd

OPTIMIZERS: dict[Optimizer, str] = {"adamw": "AdamW", "adamw8bit": "8-bit AdamW"}
BAR_WIDTH = 60
COLOURS = {
    "weights": "blue",
    "base weights": "blue",
    "quantization constants": "bright_blue",
    "adapter": "cyan",
    "optimizer": "bright_cyan",
    "gradients": "green",
    "activations": "yellow",
    "logits and loss": "magenta",
    "temporaries": "bright_yellow",
    "workspace": "bright_magenta",
    "fragmentation": "red",
    "context": "white",
}
LEAST_PART_SHOWN = 0.0005
"""Of the memory, for a category to be named."""
LEAST_SHOWN = 0.03
"""Of a step's time, for a kind of operator to be named."""
SHADES = "█▓▒░"


def plan(value: Plan) -> RenderableType:
    """The whole plan: what to do, its memory, speed and price, why, and what else was near."""
    return Group(
        _headline(value),
        Text(),
        _memory(value),
        Text(),
        _speed(value),
        Text(),
        _money(value.offers, value.workload),
        Text(),
        _alternatives(value),
        Text(),
        why(value),
    )


def model_profile(profile: ModelProfile) -> RenderableType:
    """What one layer of each kind takes under every strategy."""
    title = Text(f"{profile.model_name} on {profile.gpu.upper()}, one layer", style="bold")
    on = "" if profile.target_modules in (None, "all-linear") else f" on {targets(profile.target_modules)}"
    facts = (
        f"Micro-batch of {profile.micro_batch_size} x {profile.sequence_length} tokens, "
        f"{learned(profile.adapter, profile.rank)}{on}. "
        "MiB held between steps, saved from the forward to the backward pass, needed beyond "
        "those while either runs, recomputed at once, and sent to the host; milliseconds on the device."
    )
    parts: list[RenderableType] = [title, Text(facts, style="dim")]
    for kind in profile.kinds:
        names = f"layers {', '.join(map(str, kind.layers))}" if len(profile.kinds) > 1 else "every layer"
        parts += [Text(), Text(names, style="bold"), _layer_costs(kind)]
    reasons = dict.fromkeys(reason for _, reason in profile.refused)
    return Group(*parts, *(Text(reason, style="dim") for reason in reasons))


def _layer_costs(kind: LayerKind) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy")
    for name in ("held", "saved", "forward", "backward", "recomp.", "host", "ms", "ms back"):
        table.add_column(name, justify="right", no_wrap=True)
    for strategy, cost in kind.costs:
        sizes = (
            cost.resident_bytes,
            cost.saved_bytes,
            cost.forward_transient_bytes,
            cost.backward_transient_bytes,
            cost.recomputed_bytes,
            cost.host_bytes,
        )
        seconds = (cost.forward_seconds, cost.backward_seconds)
        table.add_row(str(strategy), *(f"{n / 2**20:,.1f}" for n in sizes), *(f"{1000 * s:.1f}" for s in seconds))
    return table


def calibration(
    device: str, rates: Mapping[str, tuple[float, float]], steps: Sequence[tuple[str, float, float]]
) -> RenderableType:
    """What a device was taken for and what it does: *rates* before and now, *steps* predicted and measured."""
    fields = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    fields.add_column("rate")
    for name in ("before", "now"):
        fields.add_column(name, justify="right")
    for field, values in rates.items():
        fields.add_row(field, *(f"{value:.3g}" for value in values))
    timed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    timed.add_column("step")
    for name in ("predicted", "measured", "error"):
        timed.add_column(name, justify="right")
    for title, predicted, measured in steps:
        timed.add_row(title, duration(predicted), duration(measured), f"{predicted / measured - 1:+.1%}")
    return Group(Text(device, style="bold"), fields, Text(), timed)


def memory_record(record: MemoryRecord) -> RenderableType:
    """A step's memory, simulated or measured."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    rows = [
        ("resident before the step", record.resident_bytes),
        ("peak allocated", record.peak_allocated_bytes),
        ("peak reserved", record.peak_reserved_bytes),
        ("peak of the process", record.peak_process_bytes),
    ]
    rows += [(f"peak of the {phase.phase} phase", phase.peak_allocated_bytes) for phase in record.phases]
    rows += [(f"at the peak: {part.category}", part.num_bytes) for part in record.categories]
    for name, num_bytes in rows:
        grid.add_row(name, f"{num_bytes / 2**20:,.2f} MiB")
    if record.step_seconds is not None:
        grid.add_row("seconds per step", duration(record.step_seconds))
    where = f", in the {record.peak_phase} phase" if record.peak_phase else ""
    where += f" of {record.peak_module}" if record.peak_module else ""
    return Group(Text(f"{record.kind} on {record.device}: peak allocated{where}", style="bold"), grid)


def _headline(value: Plan) -> RenderableType:
    configuration = value.configuration
    gpus = "one" if configuration.num_gpus == 1 else str(configuration.num_gpus)
    plural = "" if configuration.num_gpus == 1 else "s"
    machines = value.workload.num_machines
    where = "" if machines == 1 else f" in {machines} machines"
    title = Text(f"{value.model_name} on {gpus} {value.gpu.upper()}{plural}{where}", style="bold")
    grid = Table.grid(padding=(0, 2))
    if len(configuration.layers) == 1:
        grid.add_row("layers", f"{configuration.num_layers} x {strategies(configuration)}")
    else:
        for index, line in enumerate(layout(configuration)):
            grid.add_row("" if index else "layers", line)
    kind, on = learned(configuration.adapter, configuration.rank), configuration.target_modules
    grid.add_row(
        "adapter", f"none: {kind}" if on is None else f"{kind}, alpha {configuration.alpha}, {targets(on)}, fp32"
    )
    grid.add_row(
        "compute", f"{value.compute_dtype}, {value.attention} attention, {OPTIMIZERS[configuration.optimizer]}"
    )
    grid.add_row(
        "batch",
        f"{configuration.micro_batch_size} x {configuration.gradient_accumulation_steps} accumulated"
        f" x {_replicas(configuration)}"
        f" = {configuration.global_batch_size} sequences of {configuration.sequence_length} tokens per step",
    )
    if configuration.sharding == "weights":
        grid.add_row("sharing", f"each GPU holds 1/{configuration.num_gpus} of every frozen matrix")
    if configuration.num_stages > 1:
        for index, line in enumerate(_stages(value)):
            grid.add_row("" if index else "stages", line)
    if configuration.packing:
        grid.add_row("packing", _packing(value.workload))
    if configuration.loss_chunks > 1:
        grid.add_row("loss", f"in {configuration.loss_chunks} chunks of tokens")
    return Group(title, grid)


def _replicas(configuration: Configuration) -> str:
    """What shares a step's micro-batches."""
    if configuration.num_stages == 1:
        return "one GPU" if configuration.num_gpus == 1 else f"{configuration.num_gpus} GPUs"
    parts = configuration.parts_per_stage
    interleaved = f" of {parts} parts, interleaved" if parts > 1 else ""
    return f"{counted(configuration.num_replicas, 'replica')} in {configuration.num_stages} stages{interleaved}"


def _stages(value: Plan) -> list[str]:
    """Each stage's layers and memory."""
    configuration = value.configuration
    found: list[str] = []
    for number, stage in enumerate(value.prediction.stages):
        layers = ", ".join(_span(part) for part in configuration.parts_of(number))
        ends = [" after the embedding"] * (number == 0) + [", norm and head"] * (number == configuration.num_stages - 1)
        found.append(f"{number + 1}: layers {layers}{''.join(ends)}, {gib(stage.peak_process_bytes)}")
    return found


def _span(layers: range) -> str:
    return f"{layers.start}-{layers[-1]}" if len(layers) > 1 else str(layers.start)


def _packing(workload: Workload) -> str:
    if workload.num_sequences is None or workload.num_packed_sequences is None:
        return "on"
    each = workload.num_sequences / workload.num_packed_sequences
    return f"on: {each:.3g} documents per sequence on average"


def _memory(value: Plan) -> RenderableType:
    process, total = value.prediction.peak_process_bytes, value.memory_bytes
    heading = Text.assemble(("Memory at the peak  ", "bold"), f"{gib(process)} of {gib(total)}")
    bar = Text()
    filled = 0
    edge = 0.0
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    for index, part in enumerate(p for p in value.memory if p.num_bytes >= LEAST_PART_SHOWN * total):
        edge += part.num_bytes / total * BAR_WIDTH
        colour, shade = COLOURS.get(part.category, "white"), SHADES[index % len(SHADES)]
        bar.append(shade * (round(edge) - filled), style=colour)
        filled = round(edge)
        grid.add_row(Text(shade, style=colour), part.category, gib(part.num_bytes), f"{part.num_bytes / total:.1%}")
    bar.append("·" * (BAR_WIDTH - filled), style="dim")
    return Group(heading, bar, grid)


def _speed(value: Plan) -> RenderableType:
    seconds = value.prediction.step_seconds
    return Text.assemble(
        ("Speed  ", "bold"),
        f"{duration(seconds)} per step, {value.prediction.tokens_per_second:,.0f} tokens/s; "
        f"{counted(value.num_steps, 'step')} ({value.workload.total_tokens:,} tokens) "
        f"take{'s' if value.num_steps == 1 else ''} {duration(value.wall.training_seconds)}\n",
        f"of a step: {_kinds(value.time)}; {_bound(value.time)}\n",
        f"{_beside(value.wall)}: {duration(value.wall.total_seconds)} in all{_allowed(value.workload)}",
    )


def _allowed(workload: Workload) -> str:
    """What a run may take or cost, where that was said."""
    found = [] if workload.deadline_hours is None else [duration(workload.deadline_hours * 3600)]
    found += [] if workload.budget_usd is None else [usd(workload.budget_usd)]
    return f", of at most {' and '.join(found)}" if found else ""


def _kinds(time: StepTime) -> str:
    shown = [part for part in time.kinds if part.seconds >= LEAST_SHOWN * time.device_seconds]
    return ", ".join(f"{part.kind} {part.seconds / time.device_seconds:.0%}" for part in shown)


def _bound(time: StepTime) -> str:
    if not time.host_seconds:
        return "host and device are one"
    ratio = time.host_seconds / time.device_seconds
    if time.bound == "host":
        return f"launching them is the bound: it takes the host {ratio:.1f} times as long"
    return f"launching them keeps the host busy {ratio:.0%} of that time"


def _beside(wall: WallTime) -> str:
    parts = {
        "starting": wall.start_seconds,
        "loading": wall.load_seconds,
        "tokenizing": wall.tokenize_seconds,
        "evaluating": wall.evaluation_seconds,
        "saving": wall.save_seconds,
    }
    return "with " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.5)


def _money(offers: tuple[Offer, ...], workload: Workload) -> RenderableType:
    if not offers:
        each = workload.gpus_per_machine
        number = "this GPU" if each == 1 else f"{each} of this GPU"
        return Text.assemble(("Money  ", "bold"), f"no shipped instance has {number}; hours are all there is")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("instance", "left"), ("hours", "right"), ("on demand", "right"), ("spot", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for offer in offers[:3]:
        name = offer.instance if offer.num_instances == 1 else f"{offer.num_instances} x {offer.instance}"
        table.add_row(name, f"{offer.hours:.2f}", usd(offer.on_demand_usd), usd(offer.spot_usd))
    heading = Text.assemble(("Money  ", "bold"), f"{offers[0].region}, prices: {offers[0].price_date}")
    return Group(heading, table)


def _difference(prediction: Prediction, best: Prediction) -> str:
    change = prediction.step_seconds / best.step_seconds - 1
    if abs(change) < 0.005:
        return "same speed"
    return f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}"


def _alternatives(value: Plan) -> RenderableType:
    if not value.alternatives:
        return Text("No other configuration fits.")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("next best")
    for name in (*([] if value.configuration.is_full else ["rank"]), "batch", "memory", "s/step"):
        table.add_column(name, justify="right")
    table.add_column("against the plan")
    for candidate in value.alternatives:
        table.add_row(*_row(candidate, value))
    return table


def _row(candidate: Candidate, value: Plan) -> tuple[str, ...]:
    configuration, prediction = candidate.configuration, candidate.prediction
    batch = f"{configuration.micro_batch_size} x {configuration.gradient_accumulation_steps}"
    saved = value.prediction.peak_process_bytes - prediction.peak_process_bytes
    gains = [_difference(prediction, value.prediction), f"{gib(abs(saved))} {'less' if saved > 0 else 'more'}"]
    if configuration.optimizer != value.configuration.optimizer:
        gains.append(OPTIMIZERS[configuration.optimizer])
    if candidate.weight_error != value.weight_error:
        gains.append("finer weights" if candidate.weight_error < value.weight_error else "coarser weights")
    return (
        summary(configuration),
        *([] if configuration.rank is None else [str(configuration.rank)]),
        batch,
        gib(prediction.peak_process_bytes),
        f"{prediction.step_seconds:.2f}",
        ", ".join(gains),
    )
