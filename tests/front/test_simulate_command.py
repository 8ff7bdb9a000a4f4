"""A user's own step from the command line: its memory, where it runs out, and a page about it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import shallowflow
from tests.front.shell import sfplan

STEP = """
import torch

def make_step(device):
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.zeros(512, 1024, device=device)

    def step():
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
"""


@pytest.fixture(name="step")
def _step(tmp_path: Path) -> str:
    (tmp_path / "step.py").write_text(STEP, encoding="utf-8")
    return f"{tmp_path / 'step.py'}:make_step"


def test_json_is_the_record(step: str) -> None:
    """`--json` prints what Python's simulate returns, with everything that the fields promise."""
    done = sfplan("simulate", step, "--gpu", "t4", "--json")

    record = json.loads(done.output)
    assert done.code == 0
    assert record["peak_process_bytes"] == sum(part["num_bytes"] for part in record["categories"])
    assert record["peak_allocated_bytes"] == sum(part["num_bytes"] for part in record["modules"])
    assert record["step_seconds"] > 0
    assert {phase["phase"] for phase in record["phases"]} == {"load", "forward", "backward", "optimizer"}
    space: dict[str, object] = {}
    exec(STEP, space)
    assert shallowflow.simulate(space["make_step"], "t4").peak_allocated_bytes == record["peak_allocated_bytes"]  # type: ignore[arg-type]


def test_the_same_record_comes_from_both_commands(step: str) -> None:
    """Simulated and measured have the same fields, and on a CPU the same peaks."""
    simulated, measured = (
        json.loads(sfplan(*words, "--json").output)
        for words in (("simulate", step, "--gpu", "cpu"), ("measure", step, "--device", "cpu"))
    )

    assert simulated.keys() == measured.keys()
    for name in ("resident_bytes", "peak_allocated_bytes"):
        assert simulated[name] == pytest.approx(measured[name], rel=1e-3)


def test_what_does_not_fit_is_exit_code_one(step: str) -> None:
    """Phase, step, and what was asked, allocated, reserved and free, in one line."""
    done = sfplan("simulate", step, "--gpu", "t4", "--capacity-mib", "100")

    assert done.code == 1
    assert re.match(r"out of memory in \w+ of step \d.*: tried to allocate [\d.]+ MiB where", done.error())


def test_expandable_segments_are_another_allocator(step: str) -> None:
    """Pages of 2 and 20 MiB instead of segments of all sizes, for the same step."""
    plain, expandable = (
        json.loads(sfplan("simulate", step, "--json", *option).output) for option in ((), ("--expandable-segments",))
    )

    assert expandable["peak_reserved_bytes"] != plain["peak_reserved_bytes"]
    assert expandable["peak_reserved_bytes"] % (2 * 2**20) == 0
    for record in (plain, expandable):
        assert record["peak_reserved_bytes"] >= record["peak_allocated_bytes"]


def test_the_page_shows_the_record(step: str, tmp_path: Path) -> None:
    """One file that needs nothing else, with a chart and every category's bytes."""
    page = tmp_path / "step.html"

    done = sfplan("simulate", step, "--report", page, "--json")

    text = page.read_text(encoding="utf-8")
    for part in json.loads(done.output)["categories"]:
        assert f'<td>{part["category"]}</td><td class="n">{part["num_bytes"] / 2**20:,.2f} MiB</td>' in text
    assert "plotly" in text
    assert not re.findall(r'src="https?:|<link[^>]*href="https?:', text)


def test_a_page_that_cannot_be_written_is_told(step: str, tmp_path: Path) -> None:
    """A folder that is not there ends in exit code 2."""
    done = sfplan("simulate", step, "--report", tmp_path / "missing" / "step.html")

    assert done.code == 2
    assert "cannot write" in done.error()


@pytest.mark.parametrize("capacity", ["0", "-1", "much", "nan"])
def test_a_capacity_that_is_none_is_refused(step: str, capacity: str) -> None:
    """Only a positive number of MiB is one."""
    assert sfplan("simulate", step, "--capacity-mib", capacity).code == 2
