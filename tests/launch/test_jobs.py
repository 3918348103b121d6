"""Jobs that end, die, and are started again, without any training."""

import re
import sys
import time
from pathlib import Path

import pytest

from lightning_entropy.launch import job as job_module
from lightning_entropy.launch.__main__ import main
from lightning_entropy.launch.job import Job
from lightning_entropy.launch.jobs import Jobs, start

pytestmark = pytest.mark.processes


def job(folder: Path, replica: int, program: str) -> Job:
    return Job(replica, [sys.executable, "-c", program], {}, folder / f"{replica}.json")


def run(*jobs: Job) -> tuple[int, list[str]]:
    said: list[str] = []
    code = Jobs(jobs, said.append, every=1e9).run()
    assert said[-1].startswith("the training has ended ")  # and how, which is tested on its own
    return code, said[:-1]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "LONGEST_PAUSE", 0.01)


def test_one_that_dies_in_vain_is_left_and_its_status_is_the_launchers(tmp_path: Path) -> None:
    code, said = run(job(tmp_path, 0, "raise SystemExit(3)"))
    assert code == 3
    again = "replica 0 has ended with exit code 3: it is started again"
    assert said[:4] == [again] * 4 and len(said) == 5
    assert said[4].endswith("it has died too often without an outer step between, and is not started again")


def test_one_that_never_met_the_others_is_asked_about(tmp_path: Path) -> None:
    status = tmp_path / "1.json"
    program = f"import pathlib; pathlib.Path({str(status)!r}).write_text('{{\"step\": 1}}')"
    code, said = run(job(tmp_path, 0, "pass"), job(tmp_path, 1, program))
    assert code == 0
    assert said == [
        "replica 0 has ended well and reported no outer step: had its checkpoint all of them, or "
        "has its Trainer no ElasticEntropyStrategy(membership='torchft')?"
    ]


def test_one_that_makes_outer_steps_may_die_as_often_as_it_likes(tmp_path: Path) -> None:
    status, count = tmp_path / "0.json", tmp_path / "count"
    program = (
        f"import os, pathlib; s, c = pathlib.Path({str(status)!r}), pathlib.Path({str(count)!r}); "
        "n = int(c.read_text()) if c.exists() else 0; c.write_text(str(n + 1)); s.write_text('{\"step\": 1}'); "
        "n < 7 and os.kill(os.getpid(), 9)"
    )
    one = job(tmp_path, 0, program)
    code, said = run(one)
    assert code == 0 and one.restarts == 7
    assert said == ["replica 0 has ended with SIGKILL: it is started again"] * 7
    assert one.line() == "replica 0: has ended well at step 1, started again 7 times"


def test_the_last_lines_say_how_long_it_took_and_how_each_replica_ended(tmp_path: Path) -> None:
    well = job(tmp_path, 0, f"open({str(tmp_path / '0.json')!r}, 'w').write('{{\"step\": 7}}')")
    assert well._process is not None
    well._process.wait()
    said: list[str] = []
    assert Jobs([well, job(tmp_path, 1, "raise SystemExit(4)")], said.append, every=1e9).run() == 0
    assert re.fullmatch(
        r"the training has ended well after 0:\d\d:\n"
        r"  replica 0: has ended well at step 7\n"
        r"  replica 1: has ended with exit code 4",
        said[-1],
    )
    said.clear()
    assert Jobs([job(tmp_path, 2, "raise SystemExit(4)")], said.append, every=0.0).run() == 4
    assert said[1].startswith("after 0:0") and "\n  replica 2: " in said[1]  # what is said now and then
    assert said[-1].startswith("the training has ended with exit code 4 after ")


def test_what_it_has_started_ends_with_one_that_dies(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import pathlib, subprocess; child = subprocess.Popen(['sleep', '1000']); "
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); raise SystemExit(3)"
    )
    run(job(tmp_path, 0, program))
    for _ in range(100):
        try:
            # Killed, it may be there until whoever has taken it over has looked.
            state = Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it is still there")


def test_one_that_dies_when_another_has_ended_well_is_not_started_again(tmp_path: Path) -> None:
    well = job(tmp_path, 0, f"open({str(tmp_path / '0.json')!r}, 'w').write('{{\"step\": 1}}')")
    assert well._process is not None
    well._process.wait()
    code, said = run(well, job(tmp_path, 1, "import time; time.sleep(1); raise SystemExit(4)"))
    assert code == 0
    assert said == ["replica 1 has ended with exit code 4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "two", "x.py"], "must be an integer >= 1, got two"),
        (["--replicas", "0", "x.py"], "must be an integer >= 1, got 0"),
        (["--replicas", "2", "--min-replicas", "3", "x.py"], "--min-replicas must be at most --replicas, got 3 and 2"),
    ],
)
def test_numbers_out_of_range_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_jobs_are_given_no_port_that_one_of_them_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    program = "import os; raise SystemExit(3 if 'MASTER_PORT' in os.environ else 0)"
    code, _ = run(*start([sys.executable, "-c", program], 2, 1, "http://127.0.0.1:1", tmp_path))
    assert code == 0
