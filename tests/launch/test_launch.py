"""The launcher, with replicas that train."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.pages import files

pytest.importorskip("torchft")

from tests.launch import forked

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def arguments(folder: Path, replicas: int, *plan: str, min_replicas: int = 1) -> list[str]:
    options = ["--replicas", str(replicas), "--min-replicas", str(min_replicas), "--heartbeat-timeout", "1", "-m"]
    return [*options, "tests.launch.training", str(folder), *plan]


@contextmanager
def launch(folder: Path, *given: Any, **options: Any) -> Iterator[BaseProcess]:
    launcher = forked.start(arguments(folder, *given, **options), folder / "said")
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.join()


def run(folder: Path, *given: Any, **options: Any) -> str:
    """Return what a launcher that ends well and its replicas have written."""
    with launch(folder, *given, **options) as launcher:
        launcher.join(240)
        said = (folder / "said").read_text()
        assert launcher.exitcode == 0, said
    return said


def wait_for(runs: Callable[[], bool], *files: Path) -> None:
    end = time.monotonic() + 200
    while not all(file.exists() for file in files):
        assert time.monotonic() < end and runs()
        time.sleep(0.1)


@pytest.mark.parametrize("method", ["parle", "streaming"])
def test_one_of_three_is_killed_joins_again_and_all_end_with_the_same_consensus(tmp_path: Path, method: str) -> None:
    said = run(tmp_path, 3, method, "die", min_replicas=2)
    assert "replica 1 has ended with SIGKILL: it is started again" in said
    assert "replica 1 joins at step" in said
    steps, weights = zip(*(torch.load(tmp_path / f"final.{r}.pt") for r in range(3)), strict=True)
    assert len(set(steps)) == 1 and steps[0] == int((tmp_path / "stop").read_text())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["parle in int8", "streaming"])
def test_of_replicas_of_two_ranks_one_rank_is_killed_and_its_replica_joins_again(tmp_path: Path, method: str) -> None:
    said = run(tmp_path, 2, method, "die", "2", min_replicas=2)
    assert "replica 0, a job of its own (2 processes)" in said, said
    assert "replica 1 has ended with SIGKILL: it is started again" in said, said
    results = [torch.load(tmp_path / f"final.{name}.pt") for name in ("0", "0-1", "1", "1-1")]
    assert {step for step, _ in results} == {int((tmp_path / "stop").read_text())}
    for _, other in results[1:]:
        torch.testing.assert_close(other, results[0][1], rtol=0, atol=0)


def test_the_script_of_the_documentation_trains(tmp_path: Path) -> None:
    script = files()["elastic.py"]
    assert 'ModelCheckpoint("checkpoints", ' in script and "max_steps=2000" in script
    for name, folder in (("elastic.py", '"checkpoints", '), ("scattered.py", "")):
        short = script.replace("max_steps=2000", "max_steps=60").replace("steps=500", "steps=20")
        (tmp_path / name).write_text(short.replace('"checkpoints", ', folder))
        command = [sys.executable, "-m", "lightning_entropy.launch", "--replicas", "2", "--min-replicas", "2", name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        # Without a folder each job has its own, and the one that would write there says so.
        assert ("ModelCheckpoint must have a dirpath" in done.stderr) == (not folder)
        for replica in range(2):
            assert f"  replica {replica}: has ended well at step " in done.stderr
        assert "the training has ended well after 0:" in done.stderr
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_when_all_have_died_another_number_goes_on_from_the_last_consensus(tmp_path: Path) -> None:
    with launch(tmp_path, 3, "diloco", "endless") as launcher:
        wait_for(launcher.is_alive, *(tmp_path / f"started.{r}" for r in range(3)), tmp_path / "last.ckpt")
        launcher.kill()  # and the replicas with it
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"]
    said = run(tmp_path, 2, "diloco", str(saved + 40))
    assert "Restored all states" in said
    results = [torch.load(tmp_path / f"final.{r}.pt") for r in range(2)]
    assert [step for step, _ in results] == [saved + 40] * 2
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_ctrl_c_is_passed_on_once_and_nobody_is_left(tmp_path: Path) -> None:
    """Of processes as users start them; above, they are forks."""
    command = [sys.executable, "-m", "lightning_entropy.launch", *arguments(tmp_path, 2, "parle", "endless")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            wait_for(lambda: launcher.poll() is None, *(tmp_path / f"started.{r}" for r in range(2)))
            children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
            launcher.send_signal(signal.SIGINT)
            said, _ = launcher.communicate(timeout=100)
        finally:
            launcher.kill()
    assert launcher.returncode == 128 + signal.SIGINT, said
    assert [(tmp_path / f"ended.{r}").read_text() for r in range(2)] == ["KeyboardInterrupt\n"] * 2
    pids = [int(pid) for pid in children.stdout.split()]
    assert len(pids) >= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
