"""The documentation builds without a warning, and has every guide and every public name in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import shallowflow
from tests.front.tree import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as pages."""
    out = tmp_path_factory.mktemp("site")
    words = [
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-E",
        "-d",
        str(out / "doctrees"),
        str(DOCS),
        str(out / "pages"),
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return out / "pages"


def test_every_public_name_is_described(site: Path) -> None:
    """With its signature and its docstring."""
    text = (site / "api.html").read_text(encoding="utf-8")

    for name in shallowflow.__all__:
        assert f'id="shallowflow.{name}"' in text, name


def test_every_guide_is_listed(site: Path) -> None:
    """No page is out of reach, the changelog and the way to change things included."""
    index = (site / "index.html").read_text(encoding="utf-8")

    for guide in DOCS.glob("*.md"):
        assert guide.stem == "index" or f'href="{guide.stem}.html"' in index, guide.name


def test_links_lead_somewhere() -> None:
    """Every relative link in the README and the guides names a file that is there."""
    for source in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text(encoding="utf-8")):
            assert (source.parent / target).exists(), f"{source.name}: {target}"


def test_the_changelog_begins_with_the_version() -> None:
    """That is being made, or was made last."""
    first = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert first is not None and first[1] == shallowflow.__version__
