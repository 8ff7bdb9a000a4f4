"""Why a plan is the plan: what is proven of it, and what its limits cost."""

from __future__ import annotations

from rich.text import Text

from . import quality
from .plan import Plan
from .words import counted, duration, gib

LEAST_GAP_SHOWN = 5e-5


def why(value: Plan) -> Text:
    """What is proven, what binds, what the limits cost, and what the numbers leave out."""
    search = value.search
    if value.configuration.num_stages > 1:
        return Text("\n".join([*_of_stages(value), *value.notes]), style="dim")
    lines = [
        f"{_standing(value)} Searched: {counted(search.num_strategies, 'strategy', 'strategies')} for each layer in "
        f"{counted(search.num_cells, 'combination')} of micro-batch, loss and optimizer; memory "
        f"{gib(value.budget_bytes)}, less what a traced step is fragmented by. `sfplan verify` checks the proof.",
        *_price(value),
        f"The steps shown were traced whole{_rejected(search.num_rejected)}.",
        *_weights(value),
    ]
    lines += list(value.notes)
    return Text("\n".join(lines), style="dim")


def _of_stages(value: Plan) -> list[str]:
    """What is proven of a plan whose model is cut, which is of that number of stages alone."""
    search, stages, parts = value.search, value.configuration.num_stages, value.configuration.parts_per_stage
    cuts = f"all cuts into {stages} stages" if parts == 1 else f"{stages} stages of {parts} equal parts each"
    return [
        f"{_standing(value)} That is of {cuts}, any strategies of their layers and any step, none of which is "
        f"fragmented. Searched: {counted(search.num_strategies, 'strategy', 'strategies')} for each "
        f"layer in {counted(search.num_cells, 'combination')} of micro-batch, loss and optimizer; memory "
        f"{gib(value.budget_bytes)}. `sfplan verify` checks it.",
        f"The stages shown were traced whole{_rejected(search.num_rejected)}.",
    ]


def _standing(value: Plan) -> str:
    objective, proof = value.workload.objective, value.proof
    worth = quality.WORTH[objective]
    held = f"{worth:.0%} of a step" if worth < 1 else f"{worth:g} steps"
    held = "" if value.configuration.is_full else f", nf4 throughout being held as bad as {held}"
    if proof.status == "optimal":
        return f"Proven optimal by {objective}{held}."
    if proof.status == "within":
        return f"Proven to be within {proof.gap:.2%} of the best by {objective}{held}."
    return "It fits; nothing is proven of what is better."


def _price(value: Plan) -> list[str]:
    """What the limits cost, and what mixing strategies gains."""
    lines: list[str] = []
    worth = value.sensitivity
    if value.proof.unfragmented_gap >= LEAST_GAP_SHOWN:
        gain = value.proof.unfragmented_gap
        lines.append(f"Had no step any fragmentation, something might be {gain:.2%} better.")
    if worth.seconds_per_100_mib > 0:
        lines.append(
            f"What binds is the memory of the {worth.binding}: 100 MiB more would save "
            f"{duration(worth.seconds_per_100_mib)} a step."
        )
    else:
        lines.append("Memory does not bind: more of it would not make the step faster.")
    if worth.next_rank is not None and worth.next_rank_seconds is not None:
        change = worth.next_rank_seconds - value.prediction.step_seconds
        lines.append(f"Rank {worth.next_rank} would take {duration(max(0.0, change))} more a step.")
    uniform = value.search.best_uniform_seconds
    if uniform is None:
        lines.append("No single strategy for all layers fits.")
    elif uniform > value.prediction.step_seconds * 1.0005:
        longer = uniform / value.prediction.step_seconds - 1
        lines.append(f"The best single strategy for all layers takes {longer:.1%} longer.")
    return lines


def _weights(value: Plan) -> list[str]:
    """Where the weight errors come from, if they are not the usual ones."""
    if value.weighed is None:
        return []
    layers = value.weighed.layers
    errors = {
        "int8": [layer.int8 for layer in layers],
        "nf4": [layer.nf4 for layer in layers],
        "double-quantized": [layer.double_quantized for layer in layers],
    }
    ranges = ", ".join(f"{name} {min(each):.2%} to {max(each):.2%}" for name, each in errors.items())
    return [f"Weight errors are the model's own, measured layer by layer (`sfplan weigh`): {ranges}."]


def _rejected(count: int) -> str:
    if not count:
        return ""
    return f" (and {count} {'other' if count == 1 else 'others'}, which then did not fit)"
