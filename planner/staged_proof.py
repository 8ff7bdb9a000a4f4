"""What is shown of a plan whose model is cut into stages, by its proof's own tables; nothing of the search is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import quality, schedule, staged_limits
from .chain import Choice
from .needs import Unproven
from .plan import Objective
from .proof import OPTIMAL_GAP, Proof, gap
from .staged_cell import SIDES, StagedCell
from .staged_price import usual_price
from .staged_tables import choices_of, layers_of
from .strategies import Cell, Configuration, Strategy


@dataclass(frozen=True, slots=True)
class Reckoned:
    """What a plan's stages take by the proof's tables."""

    peak_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    step_picoseconds: int
    score_picoseconds: int
    harm: int


def doubts(proof: Proof, configuration: Configuration, expected: Sequence[Cell], objective: Objective) -> list[str]:
    """What is wrong with *proof* as one of *configuration* in the *expected* cells; nothing if it holds."""
    try:
        return _doubts(proof, configuration, expected, objective)
    except Unproven as error:
        return [str(error)]


def _doubts(proof: Proof, configuration: Configuration, expected: Sequence[Cell], objective: Objective) -> list[str]:
    found: list[str] = []
    spoken = [staged.cell for staged in proof.staged]
    if len(set(spoken)) < len(spoken) or set(spoken) != set(expected):
        raise Unproven(f"the proof speaks of {len(set(spoken))} cells, and {len(expected)} are allowed")
    if any(staged.num_stages != configuration.num_stages for staged in proof.staged):
        raise Unproven(f"the proof speaks of another number of stages than the plan's {configuration.num_stages}")
    if any(staged.num_parts != configuration.parts_per_stage for staged in proof.staged):
        raise Unproven(f"the proof speaks of other parts of stages than the plan's {configuration.parts_per_stage}")
    found += _counts(proof, configuration)
    found += _worth(proof, objective)
    taken = reckoned(proof, configuration)
    if taken.score_picoseconds < 1 or taken.score_picoseconds != proof.score_picoseconds:
        found.append(f"the plan scores {taken.score_picoseconds}, its proof says {proof.score_picoseconds}")
    found += _beyond_limits(proof, taken)
    shown = gap(max(1, taken.score_picoseconds), [staged_limits.least_score(proof)])
    if shown > proof.gap + OPTIMAL_GAP / 1000:
        found.append(f"gap is said to be {proof.gap:.2g} and shown to be {shown:.2g}")
    if proof.status == "optimal" and proof.gap > OPTIMAL_GAP:
        found.append(f"a plan that might be beaten by {proof.gap:.2g} is said to be optimal")
    return found


def _beyond_limits(proof: Proof, taken: Reckoned) -> list[str]:
    """What is *taken* beyond the limits of *proof*."""
    found: list[str] = []
    for stage, peak in enumerate(taken.peak_bytes):
        if peak > proof.budget_bytes:
            found.append(f"stage {stage} takes {peak} bytes of {proof.budget_bytes}")
    for stage, sent in enumerate(taken.host_bytes):
        if proof.host_bytes is not None and sent > proof.host_bytes:
            found.append(f"stage {stage} takes {sent} bytes of the host's {proof.host_bytes}")
    for name, value, limit in (
        ("harm", taken.harm, proof.harm),
        ("step", taken.step_picoseconds, proof.step_picoseconds),
    ):
        if limit is not None and value > limit:
            found.append(f"the plan's {name} is {value}, more than its limit of {limit}")
    return found


def _worth(proof: Proof, objective: Objective) -> list[str]:
    """Harms that are not those of the formats, and a price of harm that is not the *objective*'s."""
    found: list[str] = []
    choices = [c for table in proof.tables for group in table for c in choices_of(proof, group)]
    if any(choice.harm != quality.harm(choice.strategy) for choice in choices):
        found.append("the proof's tables count other weight errors than those of the formats")
    price = proof.harm_price or staged_limits.tables_price(proof)
    usual = usual_price(objective, [(staged, layers_of(proof, staged)) for staged in proof.staged])
    if price != usual and any(choice.harm for choice in choices):
        found.append(f"a unit of harm is held to be worth {price} picoseconds, for {objective} it is {usual}")
    return found


def _counts(proof: Proof, configuration: Configuration) -> list[str]:
    """Cells whose tables or stages are of another model or cut."""
    return [
        f"a cell of {staged.cell.micro_batch_size} sequences speaks of another number of layers or stages"
        for staged in proof.staged
        if len(layers_of(proof, staged)) != configuration.num_layers
        or len(staged.fixed_bytes) != configuration.num_stages
    ]


# What the plan takes


def reckoned(proof: Proof, configuration: Configuration) -> Reckoned:
    """What the stages of *configuration* take.

    Raises:
        Unproven: the proof does not speak of it.
    """
    staged = next((one for one in proof.staged if one.cell == configuration.cell), None)
    if staged is None:
        raise Unproven("the proof does not speak of the plan's own micro-batch, rank and loss")
    layers = layers_of(proof, staged)
    parts = configuration.num_stages * configuration.parts_per_stage
    if configuration.parts_per_stage > 1 and len(layers) % parts:
        raise Unproven(f"{len(layers)} layers are not divided evenly into {parts} parts")
    if len(layers) != configuration.num_layers or len(staged.fixed_bytes) != configuration.num_stages:
        raise Unproven("the proof speaks of another number of layers or stages than the plan")
    strategies = configuration.strategies()
    peaks: list[int] = []
    sent: list[int] = []
    busy: list[int] = []
    penalties = harm = 0
    for stage in range(configuration.num_stages):
        held = zip(configuration.parts_of(stage), staged.in_flight(stage), strict=True)
        made = [(_chosen(layers[number], strategies[number]), at_once) for part, at_once in held for number in part]
        if not made:
            raise Unproven(f"stage {stage} has no layers")
        peaks.append(_peak(staged, stage, made))
        most = zip(configuration.parts_of(stage), staged.most_in_flight(stage), strict=True)
        sent.append(
            sum(n * _chosen(layers[number], strategies[number]).host_bytes for part, n in most for number in part)
        )
        busy.append(
            max(staged.outside_picoseconds(stage, side) + sum(getattr(c, side) for c, _ in made) for side in SIDES)
        )
        penalties += sum(choice.penalty_picoseconds for choice, _ in made)
        harm += sum(choice.harm for choice, _ in made)
    longest = max(len(configuration.layers_of(stage)) for stage in range(configuration.num_stages))
    passes = schedule.step_picoseconds(busy, staged.num_micro_batches, staged.num_parts)
    step = passes + staged.update_picoseconds * longest
    score = step + (proof.harm_price * harm if proof.harm_price else penalties)
    return Reckoned(tuple(peaks), tuple(sent), step, score, harm)


def _chosen(choices: Sequence[Choice], strategy: Strategy) -> Choice:
    found = next((choice for choice in choices if choice.strategy == strategy), None)
    if found is None:
        raise Unproven(f"the proof does not speak of {strategy}")
    return found


def _saved(choice: Choice) -> int:
    return choice.forward_change_bytes + choice.release_bytes


def _peak(staged: StagedCell, stage: int, made: Sequence[tuple[Choice, int]]) -> int:
    """The most that is allocated in a micro-batch, while all others in flight hold what they have saved."""
    is_last = stage == staged.num_stages - 1
    level = staged.outside_bytes(stage)
    layers = [choice for choice, _ in made]
    others = [(at_once - 1) * _saved(choice) for choice, at_once in made]
    level += sum(choice.resident_bytes for choice in layers)
    if staged.num_parts == 1:  # those of the others stay all along; of interleaved stages they go with one's own
        level += sum(others)
        others = [0] * len(layers)
    levels = [level]
    for choice, more in zip(layers, others, strict=True):
        levels.append(level + choice.forward_high_bytes)
        level += choice.forward_change_bytes + more
    level += sum(choice.release_bytes for choice in layers)
    if is_last:
        levels.append(level + staged.head_high_bytes)
        level += staged.head_change_bytes
    for choice, more in zip(reversed(layers), reversed(others), strict=True):
        levels.append(level + choice.backward_high_bytes)
        level += choice.backward_change_bytes - more
    levels.append(level + staged.update_high_bytes * len(layers))
    return max(levels)
