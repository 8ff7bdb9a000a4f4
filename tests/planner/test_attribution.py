"""Every byte at the peak is something, belongs somewhere, and was there when the timeline says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shallowflow.planner.memory_record import MemoryRecord
from shallowflow.planner.profiler.allocator import OutOfMemory
from shallowflow.planner.profiler.attribution import CATEGORIES
from shallowflow.planner.profiler.user_step import simulate

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=1000, tie_word_embeddings=False,
)  # fmt: skip


class Step:
    """Full fine-tuning of a small Llama, with what comes after training."""

    def __init__(self, device: str, recompute: bool, empties: bool = False) -> None:
        self.model = LlamaForCausalLM._from_config(CONFIG, dtype=torch.float16).to(device)
        if recompute:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        self.tokens = torch.zeros((4, 128), dtype=torch.int64, device=device)
        self.empties = empties

    def __call__(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.empties:
            torch.cuda.empty_cache()


class Evaluated(Step):
    """The same, followed by an evaluation of far more tokens at once."""

    def evaluate(self) -> None:
        """One large batch without gradients."""
        with torch.no_grad():
            self.model(input_ids=self.tokens.repeat(16, 1), use_cache=False)


def record(recompute: bool = False, kind: type[Step] = Step, **options: bool) -> MemoryRecord:
    """The simulated step on a T4."""
    return simulate(lambda device: kind(device, recompute), "t4", **options)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_byte_has_a_category_and_a_module(recompute: bool) -> None:
    """Modules sum to allocated, categories to the process, and both agree category by category."""
    found = record(recompute)

    assert sum(part.num_bytes for part in found.modules) == found.peak_allocated_bytes
    assert sum(part.num_bytes for part in found.categories) == found.peak_process_bytes
    for part in found.categories:
        assert part.category in CATEGORIES
        if part.category not in ("fragmentation", "context"):
            assert part.num_bytes == sum(m.num_bytes for m in found.modules if m.category == part.category)


def test_parameters_states_and_activations_belong_to_their_layers() -> None:
    """Weights and optimizer states are their modules' to the byte, and each layer saves the same activations."""
    found = record()
    in_layer = {
        (part.category, layer): sum(
            m.num_bytes
            for m in found.modules
            if m.category == part.category and m.module.startswith(f"model.layers.{layer}.")
        )
        for part in found.categories
        for layer in range(3)
    }

    weights = sum(p.numel() for p in LlamaForCausalLM(CONFIG).model.layers[0].parameters())
    assert in_layer["base weights", 0] == in_layer["base weights", 1] == pytest.approx(weights * 2, rel=0.01)
    assert in_layer["optimizer", 1] == pytest.approx(2 * weights * 2, rel=0.05)
    assert in_layer["activations", 1] == in_layer["activations", 2] > 0
    assert {m.module for m in found.modules if m.category == "logits and loss"} <= {"", "lm_head"}


def test_what_is_computed_again_is_told_from_what_was_saved() -> None:
    """Only with recomputation are there recomputed activations, and then fewer saved ones."""

    def held(found: MemoryRecord, category: str) -> int:
        assert found.timeline is not None
        return max(found.timeline.categories.get(category, (0,)))

    saving, recomputing = record(), record(recompute=True)

    assert held(saving, "recomputed activations") == 0
    assert held(recomputing, "recomputed activations") > 0
    assert held(recomputing, "activations") < held(saving, "activations") / 3


@pytest.mark.parametrize("recompute", [False, True])
def test_the_timeline_meets_the_peak(recompute: bool) -> None:
    """Its highest point is the peak, its phases follow one another, and nothing exceeds what is reserved."""
    found = record(recompute)
    timeline = found.timeline
    assert timeline is not None

    allocated = [sum(levels) for levels in zip(*timeline.categories.values(), strict=True)]

    assert max(allocated) == found.peak_allocated_bytes
    assert all(low <= high for low, high in zip(allocated, timeline.reserved_bytes, strict=True))
    assert [name for _, name in timeline.phases if not name.startswith("end")] == ["backward", "optimizer"]
    assert list(timeline.positions) == sorted(set(timeline.positions))


@pytest.mark.parametrize("expandable_segments", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_fits_in_its_reserved_peak_and_not_in_one_percent_less(
    recompute: bool, expandable_segments: bool
) -> None:
    """The capacity that is predicted suffices as it is; 1 % less takes giving memory back, or is not enough at all."""

    def retries(capacity: int) -> int | None:
        try:
            return simulate(
                lambda device: Step(device, recompute), "t4", capacity, expandable_segments=expandable_segments
            ).num_retries
        except OutOfMemory:
            return None

    peak = record(recompute, expandable_segments=expandable_segments).peak_reserved_bytes

    assert retries(peak) == 0
    assert retries(int(peak * 0.99)) != 0


def test_running_out_says_where() -> None:
    """Phase, step and module, what was asked and what there was."""
    with pytest.raises(
        OutOfMemory, match=r"out of memory in forward of step 0, module .*: tried to allocate \d"
    ) as caught:
        simulate(lambda device: Step(device, False), "t4", 8 * 2**20)

    assert "reserved but unallocated" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_comes_after_training_is_seen() -> None:
    """An evaluation that needs more than the step raises the reserved peak, not the step's."""
    plain, evaluated = record(), record(kind=Evaluated)

    assert evaluated.peak_allocated_bytes == plain.peak_allocated_bytes
    assert evaluated.peak_reserved_bytes > plain.peak_reserved_bytes
    assert {phase.phase for phase in evaluated.phases} - {phase.phase for phase in plain.phases} == {"evaluate"}
    with pytest.raises(OutOfMemory, match="in evaluate"):
        simulate(lambda device: Evaluated(device, False), "t4", plain.peak_reserved_bytes + 2**21)


def test_emptying_the_cache_gives_memory_back() -> None:
    """``torch.cuda.empty_cache`` in the step is replayed, and PyTorch's own is put back."""
    before: Callable[[], None] = torch.cuda.empty_cache

    kept = record()
    emptied = simulate(lambda device: Step(device, False, empties=True), "t4")

    assert emptied.timeline is not None and kept.timeline is not None
    assert emptied.timeline.reserved_bytes[0] < kept.timeline.reserved_bytes[0]
    assert torch.cuda.empty_cache is before


def test_a_simulated_step_has_a_time() -> None:
    """The roofline's seconds: more than nothing, and longer on a slower chip."""
    slow, fast = (simulate(lambda device: Step(device, False), gpu).step_seconds for gpu in ("t4", "a100-80gb"))

    assert slow is not None and fast is not None
    assert 0 < fast <= slow
