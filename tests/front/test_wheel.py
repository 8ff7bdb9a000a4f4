"""The wheel holds what the tree holds, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shallowflow.own_wheel import SHIPPED, own_wheel
from shallowflow.session import RequestError
from tests.front.tree import ROOT, project_files

PARTS = {"planner": "planner", "profiles": "profiles", "runtime": "runtime", "src/shallowflow": ""}


def copy_of_the_tree(folder: Path) -> Path:
    """Every file that belongs to the project, links as links, without what was built."""
    for source in project_files():
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the tree stays clean."""
    tree, out = copy_of_the_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


def expected() -> dict[str, bytes]:
    """What should be installed, by its path, from the tree's own folders."""
    found = {}
    for folder, inside in PARTS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SHIPPED and path.is_file() and "__pycache__" not in path.parts:
                name = Path("shallowflow", inside, path.relative_to(ROOT / folder))
                found[name.as_posix()] = path.read_bytes()
    return found


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    """Modules, facts, templates and the typing marker are in it with the tree's bytes, and nothing but its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}

    packaged = {name: data for name, data in contents.items() if ".dist-info/" not in name}
    assert packaged.keys() == expected().keys()
    assert packaged == expected()
    tops = {name.split("/")[0] for name in contents}
    (metadata,) = tops - {"shallowflow"}
    assert metadata.startswith("shallowflow-") and metadata.endswith(".dist-info")
    assert f"{metadata}/licenses/LICENSE" in contents
    assert b"sfplan = shallowflow.cli:main" in contents[f"{metadata}/entry_points.txt"]


def test_what_runs_here_packs_itself(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a wheel with the same files and the same facts as a built one, which pip installs; always the same bytes."""
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path / "cache"))

    own = own_wheel()

    first = own.read_bytes()
    assert own_wheel().read_bytes() == first and own.name == wheel.name
    with zipfile.ZipFile(own) as mine, zipfile.ZipFile(wheel) as built:
        assert {name for name in mine.namelist() if ".dist-info" not in name} == expected().keys()
        assert all(mine.read(name) == content for name, content in expected().items())
        for name in ("entry_points.txt", "licenses/LICENSE"):
            (path,) = (n for n in built.namelist() if n.endswith(f".dist-info/{name}"))
            assert mine.read(path) == built.read(path)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path / "there"), str(own)], check=True)
    assert (tmp_path / "there" / "shallowflow" / "cli.py").is_file()


def test_what_is_not_installed_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no metadata to give; the refusal names the way out."""
    monkeypatch.setattr("shallowflow.own_wheel.NAME", "shallowflow-that-nobody-has")

    with pytest.raises(RequestError, match=r"runs without being installed; give --package FILE\.whl"):
        own_wheel()


def test_the_wheel_has_every_kind_of_file() -> None:
    """The comparison covers each kind of file that must be shipped."""
    names = expected()

    assert {"shallowflow/py.typed", "shallowflow/cli.py", "shallowflow/planner/profiler/trace.py"} <= names.keys()
    assert {"shallowflow/profiles/gpus/t4.toml", "shallowflow/profiles/instances/g4dn.toml"} <= names.keys()
    assert "shallowflow/profiles/models/meta-llama--Llama-3.1-8B.json" in names
    assert "shallowflow/runtime/templates/report.html" in names


def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, the package finds its own facts and its template."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import shallowflow, jinja2; from shallowflow.cli import main\n"
        "assert shallowflow.__file__.startswith(sys.argv[1])\n"
        "jinja2.PackageLoader('shallowflow.runtime', 'templates').get_source(jinja2.Environment(), 'report.html')\n"
        "main(['gpus']); main(['models'])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "t4 " in done.stdout and "meta-llama/Llama-3.1-8B" in done.stdout
