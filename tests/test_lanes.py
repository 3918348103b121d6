"""The lanes are what they say: what starts a process is marked, and the rules name what there is."""

import re
from pathlib import Path

import pytest

from tests import conftest, forked

HERE = Path(__file__).parent


def test_every_name_and_place_of_the_rules_exists() -> None:
    written = "\n".join(path.read_text() for path in HERE.rglob("test_*.py"))
    names = set().union(*conftest.NAMES.values())
    missing = {name for name in names if not re.search(rf"^def {name}\(", written, re.MULTILINE)}
    missing |= {place for place in conftest.PLACES if not (HERE / place).exists()}
    assert missing == set()


@pytest.mark.processes
def test_a_process_that_is_not_marked_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\nfrom tests.conftest import *  # noqa: F403\n"
    )
    (tmp_path / "test_it.py").write_text(
        """
import multiprocessing, os, subprocess, sys, pytest

def test_popen(): subprocess.run([sys.executable, "-c", ""], check=True)
def test_start():
    process = multiprocessing.get_context("spawn").Process(target=print); process.start(); process.join()
def test_fork():
    if (pid := os.fork()) == 0: os._exit(0)
    os.waitpid(pid, 0)
@pytest.fixture(scope="module")
def started(): subprocess.run([sys.executable, "-c", ""], check=True)
def test_fixture(started): pass
def test_nothing(): pass
@pytest.mark.processes
def test_marked(): subprocess.run([sys.executable, "-c", ""], check=True)
"""
    )
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    done = forked.run("pytest", *options, tmp_path, cwd=tmp_path)
    failed = set(re.findall(r"^FAILED \S+::(\w+) - Failed: a test that starts a process", done.stdout, re.MULTILINE))
    assert failed == {"test_popen", "test_start", "test_fork", "test_fixture"}, done.stdout + done.stderr
    assert "4 failed, 2 passed" in done.stdout
