"""What is released: the sdist and the wheel that is built from it hold what they should, and the wheel works."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

# Imports the installed package before anything of the folder it stands in, and says which one it was.
QUICKSTART = """
import runpy, sys, lightning_entropy
print(lightning_entropy.__file__, lightning_entropy.__version__)
sys.argv = ["quickstart", "--epochs", "1", "--seeds", "1"]
runpy.run_module("recipes.quickstart", run_name="__main__")
"""


def run(*command: str | Path, cwd: Path, path: str = "") -> str:
    """Run a command with another PYTHONPATH and return what it prints."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"', (ROOT / "lightning_entropy/version.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.processes
def test_the_wheel_that_is_built_from_the_sdist_trains(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    name = f"lightning_entropy-{version()}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as sdist:
        files = {member.name.removeprefix(f"{name}/") for member in sdist.getmembers()}
        for needed in ("LICENSE", "CITATION.cff", "recipes/configs/nets/lenet.yaml", "tests/golden/runs.json"):
            assert needed in files
        # Ours, so that no filter is needed; before 3.10.12 and 3.11.4 there is none, from 3.12 on it is asked for.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        sdist.extractall(tmp_path / "sdist", **safe)
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lightning_entropy").rglob("*.py")}
    extras = {"lightning_entropy/py.typed", "lightning_entropy/engine/native/step.cpp"}
    assert {file for file in held if not file.startswith(f"{name}.dist-info/")} == package | extras
    assert f"{name}.dist-info/licenses/LICENSE" in held
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "# lightning_entropy" in metadata  # the README

    installed, work = tmp_path / "installed", tmp_path / "work"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    run(*pip, cwd=tmp_path)
    work.mkdir()
    (tmp_path / "sdist" / name / "recipes").rename(work / "recipes")
    printed = run(sys.executable, "-c", QUICKSTART, cwd=work, path=f"{installed}{os.pathsep}{work}")
    assert printed.startswith(f"{installed}/lightning_entropy/__init__.py {version()}\n")
    assert "| EntropySGD " in printed
    assert (work / "quickstart.png").stat().st_size > 0


def test_the_citation_names_this_version_and_this_address() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert citation["version"] == version()
    assert citation["license"] == re.search(r'^license = "(.+)"', project, re.MULTILINE)[1]  # type: ignore[index]
    assert citation["repository-code"] == re.search(r'^Repository = "(.+)"', project, re.MULTILINE)[1]  # type: ignore[index]
    assert f"version = {{{version()}}}" in (ROOT / "docs/citation.md").read_text()
    released = re.search(r"^## \[(\d.*)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert released.groups() == (citation["version"], str(citation["date-released"]))


def test_the_issue_templates_are_forms() -> None:
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= set(form), path
        for field in form["body"]:
            assert field["type"] in ("textarea", "input"), path
            assert {"id", "attributes"} <= set(field), path
