"""A refusal says how much is missing, and what to try, mildest first."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.plan import Workload
from shallowflow.planner.remedies import SMALLEST_RANK, SMALLEST_SEQUENCE, Infeasible, Remedy, changes
from shallowflow.profiles import gpu_names, load_gpu
from tests.strategies import T4, workloads

GIB = 2**30
GPUS = [load_gpu(name) for name in gpu_names()]
options = st.sampled_from(["--sequence-length 1024", "--gpu l4", "--min-rank 8", "--quantization any"])
remedies = st.lists(st.builds(Remedy, option=options, peak_process_bytes=st.integers(0, 2**40)), max_size=3)


def kinds(workload: Workload) -> list[str]:
    """The options that are tried, each once, in order."""
    groups = changes(workload, T4, GPUS, (8, 16))
    return [kind for group in groups for kind in dict.fromkeys(change.option.split()[0] for change in group)]


@given(workloads())
def test_the_mildest_changes_come_first(workload: Workload) -> None:
    """First another format or rank, then fewer tokens, and other GPUs last; nothing is tried that was not asked."""
    expected = [] if workload.quantization == "any" else ["--quantization"]
    if workload.rank is None:
        expected += ["--min-rank"] if workload.min_rank > SMALLEST_RANK else []
    else:
        expected += ["--rank"] if workload.rank > SMALLEST_RANK else []
    expected += ["--sharding"] if workload.sharding == "none" else []
    expected += ["--sequence-length"] if workload.sequence_length >= 2 * SMALLEST_SEQUENCE else []

    assert kinds(workload) == [*expected, "--gpu", "--gpus"]


@given(workloads())
def test_a_fixed_optimizer_is_the_first_to_go(workload: Workload) -> None:
    """Where AdamW was asked for, 8 bits for its state cost the least; without that they are chosen anyway."""
    asked = replace(workload, optimizer="adamw")

    first = next(iter(changes(asked, T4, GPUS)))

    assert [change.option for change in first] == ["--optimizer adamw8bit"]
    assert [change.workload for change in first] == [replace(workload, optimizer="adamw8bit")]


@given(workloads())
def test_a_group_goes_from_mild_to_harsh(workload: Workload) -> None:
    """Sequences are halved down to the smallest; GPUs come by memory, each larger than the one at hand."""
    tried = {change.option: change for group in changes(workload, T4, GPUS) for change in group}

    lengths = [c.workload.sequence_length for o, c in tried.items() if o.startswith("--sequence-length")]
    larger = [c.gpu.memory_bytes for o, c in tried.items() if o.startswith("--gpu ")]
    halves = [workload.sequence_length // 2**n for n in range(1, len(lengths) + 1)]
    assert lengths == halves
    assert all(length >= SMALLEST_SEQUENCE for length in lengths)
    assert workload.sequence_length // 2 ** (len(lengths) + 1) < SMALLEST_SEQUENCE
    assert larger == sorted(larger)
    assert all(memory > T4.memory_bytes for memory in larger)


@given(workloads())
def test_a_change_changes_what_it_says(workload: Workload) -> None:
    """One entry of the request differs, and the option spells its new value."""
    for group in changes(workload, T4, GPUS, (8, 16)):
        for change in group:
            option, value = change.option.split()
            if option == "--gpu":
                assert change.workload == workload
                assert change.gpu.name == value != T4.name
                continue
            name = "num_gpus" if option == "--gpus" else option.removeprefix("--").replace("-", "_")
            changed = getattr(change.workload, name)
            assert str(changed) == value
            undone = replace(change.workload, **{name: getattr(workload, name)}, num_sequences=workload.num_sequences)
            assert (undone, change.gpu) == (workload, T4)


@given(workloads(), st.sampled_from(GPUS))
def test_advice_does_not_depend_on_the_host(workload: Workload, gpu: object) -> None:
    """However much memory the planning machine has, its own CPU is no remedy for a GPU."""
    host = replace(load_gpu("cpu"), memory_bytes=2**50)
    assert gpu in GPUS

    tried = [c.option for group in changes(workload, T4, [*GPUS, host]) for c in group]

    assert "--gpu cpu" not in tried


def test_the_message_says_how_much_is_missing_and_what_would_fit() -> None:
    """One line of numbers in GiB, and one aligned line per remedy."""
    refusal = Infeasible(
        17 * GIB,
        int(14.42 * GIB),
        [
            Remedy(option="--sequence-length 1024", peak_process_bytes=int(13.1 * GIB)),
            Remedy(option="--gpu l4", peak_process_bytes=int(10.84 * GIB)),
        ],
    )

    assert str(refusal).splitlines() == [
        "no plan fits in 14.42 GiB: the smallest needs 17.00 GiB, 2.58 GiB too much.",
        "This would fit:",
        "  --sequence-length 1024   (13.10 GiB)",
        "  --gpu l4                 (10.84 GiB)",
    ]


@given(st.integers(1, 2**42), st.integers(1, 2**42), remedies)
def test_the_message_adds_up(smallest: int, memory: int, offered: list[Remedy]) -> None:
    """What is too much is what is needed less what is there, to the digits shown; each remedy has its line."""
    said = str(Infeasible(smallest, memory, offered))

    there, needed, missing = (float(number) for number in re.findall(r"(-?\d+\.\d\d) GiB", said.splitlines()[0]))
    assert abs(needed - there - missing) < 0.0101
    assert ("This would fit:" in said) == bool(offered)
    assert [line.split("   ")[0].strip() for line in said.splitlines()[2:]] == [remedy.option for remedy in offered]


@given(st.integers(1, 2**42), st.integers(1, 2**42), remedies)
def test_the_refusal_for_programs_is_json(smallest: int, memory: int, offered: list[Remedy]) -> None:
    """Bytes stay bytes, and every remedy is there."""
    refusal = Infeasible(smallest, memory, offered)

    content = json.loads(json.dumps(refusal.as_dict()))

    assert content["error"] == "infeasible"
    assert (content["smallest_bytes"], content["memory_bytes"]) == (smallest, memory)
    assert [Remedy(**remedy) for remedy in content["remedies"]] == list(refusal.remedies) == offered
