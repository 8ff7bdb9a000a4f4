"""What a step takes, layer by layer, by a proof's own tables; nothing of the search is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .chain import Chain, Choice, Limits


@dataclass(frozen=True, slots=True)
class Reckoned:
    """What the layers of a step take together with all else."""

    peak_bytes: int
    step_picoseconds: int
    score_picoseconds: int
    harm: int
    host_bytes: int

    def excess(self, limits: Limits) -> list[tuple[str, int, int]]:
        """What is more than its limit, by name, with the limit."""
        limited = (
            ("memory", self.peak_bytes, limits.memory_bytes),
            ("weight error", self.harm, limits.harm),
            ("host memory", self.host_bytes, limits.host_bytes),
            ("time", self.step_picoseconds, limits.step_picoseconds),
        )
        return [(name, value, limit) for name, value, limit in limited if limit is not None and value > limit]


def reckoned(chain: Chain, layers: Sequence[Choice]) -> Reckoned:
    """What *chain* takes with *layers* chosen, in the order of the forward pass.

    Of harm, and of the score so far as it depends on it, no more than any order of them takes.
    """
    level = chain.fixed_bytes + sum(layer.resident_bytes for layer in layers)
    levels = [level]
    for layer in layers:
        levels.append(level + layer.forward_high_bytes)
        level += layer.forward_change_bytes
    level += sum(layer.release_bytes for layer in layers)
    levels.append(level + chain.head_high_bytes)
    level += chain.head_change_bytes
    for layer in reversed(layers):
        levels.append(level + layer.backward_high_bytes)
        level += layer.backward_change_bytes
    levels.append(level + chain.update_high_bytes)
    device = chain.device_picoseconds + sum(layer.device_picoseconds for layer in layers)
    host = chain.host_picoseconds + sum(layer.host_picoseconds for layer in layers)
    step = chain.gradient_accumulation_steps * max(device, host) + chain.update_picoseconds
    return Reckoned(
        peak_bytes=max(levels),
        step_picoseconds=step,
        score_picoseconds=step + chain.penalty_beyond_picoseconds + sum(layer.penalty_picoseconds for layer in layers),
        harm=chain.harm_beyond + sum(layer.harm for layer in layers),
        host_bytes=sum(layer.host_bytes for layer in layers),
    )
