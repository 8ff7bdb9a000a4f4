"""The public names, and what every reader of the source may rely on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shallowflow
from tests.front.tree import ROOT, project_files

SOURCES = sorted(
    path for folder in ("planner", "profiles", "runtime", "src/shallowflow") for path in (ROOT / folder).rglob("*.py")
)
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users)/\w")


def public(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef]:
    """The functions and classes that a module offers, and those that its public classes offer."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def test_every_public_name_is_there() -> None:
    """What the package says that it offers can be imported, is listed by ``dir`` and is documented."""
    assert shallowflow.__all__ == sorted(set(shallowflow.__all__))
    assert set(dir(shallowflow)) == {*shallowflow.__all__, "__version__"}
    for name in shallowflow.__all__:
        assert getattr(shallowflow, name).__doc__, name
        assert getattr(shallowflow, name) is getattr(shallowflow, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as it does on any module, and imports nothing."""
    with pytest.raises(AttributeError, match="module 'shallowflow' has no attribute 'plna'"):
        shallowflow.plna  # noqa: B018


def test_importing_is_light() -> None:
    """Neither the package nor its command line imports a heavy library or a part that is not asked for."""
    code = (
        "import sys, shallowflow, shallowflow.cli; dir(shallowflow); shallowflow.Workload\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'plotly', 'shallowflow.runtime.run'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)

    assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_says_what_it_is(path: Path) -> None:
    """Every module, and every public function, class and method in it, begins its docstring with a sentence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    said = {node.name: ast.get_docstring(node) for node in public(tree)}
    assert ast.get_docstring(tree)
    assert [name for name, text in said.items() if not text or not text.strip()] == []


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    """No text of the project names a folder of some machine's own."""
    paths = [path for path in project_files() if not path.is_symlink()]
    assert ROOT / "pyproject.toml" in paths

    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["see /{}/me/file", '"/{}/x"', "(/{}/a)", "\n/{}/a/b", "`/{}/a`"])
@pytest.mark.parametrize("folder", ["home", "root", "work"])
def test_a_path_of_a_machine_is_recognized(text: str, folder: str) -> None:
    """The search finds such a path in quotes, brackets and at the start of a line, and not in an address."""
    assert MACHINE_PATH.search(text.format(folder))
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/page and a/{folder}/b")
