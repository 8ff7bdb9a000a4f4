"""The notebook runs from its first cell to its last, and shows what the package says; plans show themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from shallowflow.planner import render
from shallowflow.planner.notebook import WIDTH
from shallowflow.planner.serialize import from_json
from tests.front.tree import ROOT

NOTEBOOK = ROOT / "examples" / "fine_tune.ipynb"


def read() -> Any:
    """The notebook as it lies in the tree."""
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def shown(cell: Any) -> dict[str, str]:
    """What a cell shows at its end, by kind."""
    (found,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return dict(found.data)


@pytest.fixture(scope="module")
def ran(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after all of its cells, with a model and a work of seconds."""
    book = read()
    (parameters,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"^([A-Z_]+) = ", parameters.source, re.MULTILINE)
    assert names == ["MODEL", "WEIGHTS", "SEQUENCE_LENGTH", "GLOBAL_BATCH_SIZE", "STEPS"]
    values = (str(tiny_folder), str(tiny_folder), 32, 4, 2)
    parameters.source = "".join(f"{name} = {value!r}\n" for name, value in zip(names, values, strict=True))
    place = tmp_path_factory.mktemp("notebook")
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(place)}}).execute()
    return book, place


def test_the_notebook_runs(ran: Any) -> None:
    """It plans, shows the plan and its page, trains two steps as planned, and shows the report."""
    book, place = ran
    by_last_line = {cell.source.splitlines()[-1]: cell for cell in book.cells if cell.cell_type == "code"}

    plan, record = shown(by_last_line["plan"]), shown(by_last_line["record"])
    assert "tiny on one CPU" in plan["text/html"] and "Proven optimal" in plan["text/html"]
    assert "completed, 2 steps" in record["text/html"]
    for line in ("plan", "record"):  # once, and not by the way
        shows = [output for output in by_last_line[line].outputs if "html" in str(output.get("data", ()))]
        assert [output.output_type for output in shows][-1:] == ["execute_result"]
        assert sum("Proven optimal" in str(output) or "predicted and measured" in str(output) for output in shows) == 1
    assert "peak allocated" in record["text/html"] and "perplexity on held-out text" in record["text/html"]
    pages = [shown(cell)["text/html"] for line, cell in by_last_line.items() if line.startswith("HTML(")]
    assert len(pages) == 2 and all("plotly" in page for page in pages)
    assert (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
    told = [output for cell in book.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
    assert not [output.text for output in told if "Error" in output.text]


def test_a_plan_shows_itself_as_a_terminal_does(tiny_plan: str) -> None:
    """The same words in the same columns; tags around them alone."""
    from rich.console import Console

    plan = from_json(tiny_plan)
    console = Console(width=WIDTH, highlight=False)
    with console.capture() as printed:
        console.print(render.plan(plan))

    text = re.sub(r"<[^>]+>", "", plan._repr_html_())

    plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'").replace("&quot;", '"')
    assert plain.replace("&amp;", "&").split() == re.sub(r"\x1b\[[0-9;]*m", "", printed.get()).split()


def test_the_notebook_holds_no_results() -> None:
    """What it shows depends on the machine; the file holds what is asked alone."""
    book = read()

    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
