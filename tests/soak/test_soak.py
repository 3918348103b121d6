"""The soak finds nothing in a short run, and finds what is put there."""

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.strategies.replica import ReplicaLoops
from tests.lightning_modules import LIGHTNING_WARNINGS
from tests.soak import replicas
from tests.soak.__main__ import main, soak, soak_replicas, table
from tests.soak.children import HANG, in_child
from tests.soak.disturbances import OURS, Disturbance, Hurt, watched
from tests.soak.rounds import BAD, KINDS, Outcome, Verdict, difference
from tests.soak.trainings import Training

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    *[pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS],
]


def test_a_short_run_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "12", "--seed", "2"]) == 0, capsys.readouterr().out
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "all"
    assert sum(map(int, last[1:])) == 12


def test_a_short_run_with_replicas_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replicas", "--rounds", "6", "--seed", "2"]) == 0, capsys.readouterr().out
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "all"
    assert sum(map(int, last[1:])) == 6


def first_of_replicas(kind: str) -> int:
    """Return the number of a round of seed 2 in which a job saves every step and a rank meets with this, mid-way."""
    for number in range(10000):
        job, strike = replicas.drawn(2, number)
        if (job.save, job.ranks, strike.kind, strike.step, strike.moment) == (1, 2, kind, 7, "training"):
            return number
    raise AssertionError(kind)


def test_replicas_that_lose_something_at_a_resume_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    number = first_of_replicas("exception")
    assert [o.verdict for o in soak_replicas(2, [number])] == [Verdict.EQUAL]
    load = ReplicaLoops.load_state_dict

    def forgetful(self: Any, state: dict[str, Any]) -> None:
        load(self, {**state, "loops": [{**loop, "inner_step": 0} for loop in state["loops"]]})

    monkeypatch.setattr(ReplicaLoops, "load_state_dict", forgetful)
    assert [o.verdict for o in soak_replicas(2, [number])] == [Verdict.DIFFERS]


def test_a_rank_that_is_not_named_is_a_wrong_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "REASONS", {"exception": "another reason"})
    (outcome,) = soak_replicas(2, [first_of_replicas("exception")])
    assert outcome.verdict is Verdict.WRONG_ERROR
    assert "its reason must be given" in outcome.notes[-1]


def first_round(kind: str) -> int:
    """Return the number of a round of seed 2 whose training saves every step, and is exact in plain Lightning."""
    for number in range(10000):
        draw = random.Random(f"2:{number}")
        training = Training.drawn(draw)
        exact = training.loader == "stream" and training.dropout != "torch" and training.accumulate == 1
        tried = training.save == 1 and training.inner_steps == 5 and training.method == "entropy_sgd"
        if exact and tried and draw.choice(KINDS) == kind:
            return number
    raise AssertionError(kind)


def test_a_resume_that_loses_something_differs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    load = le.InnerOuterCallback.load_state_dict

    def forgetful(self: Any, state: dict[str, Any]) -> None:
        load(self, {**state, "loops": [{**loop, "outer_step": 0, "inner_step": 0} for loop in state["loops"]]})

    number = first_round("exception")
    assert [o.verdict for o in soak(2, [number])] == [Verdict.EQUAL]
    monkeypatch.setattr(le.InnerOuterCallback, "load_state_dict", forgetful)
    capsys.readouterr()
    assert main(["--seed", "2", "--round", str(number)]) == 1
    out = capsys.readouterr().out
    assert f"round {number}, exception: DIFFERS" in out
    assert f"again: python -m tests.soak --seed 2 --round {number}" in out


def test_an_error_of_ours_in_the_place_of_the_users_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_exception(self: Any, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        raise KeyError("out of the depth")

    monkeypatch.setattr(le.InnerOuterCallback, "on_exception", on_exception)
    (outcome,) = soak(2, [first_round("exception")])
    assert outcome.verdict is Verdict.WRONG_ERROR
    assert "out of the depth" in outcome.notes[-1]


def test_a_child_that_hangs_is_ended_and_says_where(tmp_path: Path) -> None:
    ended = in_child(lambda: time.sleep(1000), tmp_path / "child", limit=1.0)
    assert ended.code == HANG
    assert "test_soak.py" in ended.said
    assert in_child(lambda: 3, tmp_path / "other", limit=60.0).code == 0


def test_a_child_says_what_it_returns_raises_and_dies_of(tmp_path: Path) -> None:
    ended = in_child(lambda: {"w": torch.ones(2)}, tmp_path / "a", limit=60.0)
    assert ended.code == 0
    assert difference(ended.result, {"w": torch.ones(2)}) is None
    ended = in_child(lambda: 1 / 0, tmp_path / "b", limit=60.0)
    assert (ended.code, ended.error, ended.result) == (1, "ZeroDivisionError: division by zero", None)
    ended = in_child(lambda: os.kill(os.getpid(), 9), tmp_path / "c", limit=60.0)
    assert (ended.code, ended.result) == (-9, None)


def test_a_moment_is_counted_in_calls_and_comes_again(tmp_path: Path) -> None:
    training = Training("lookahead", 3, 1, max_steps=5)
    _, calls = watched(lambda: training.fit(tmp_path / "a"), lambda place, number: None)
    assert calls["training_step"] == 5
    assert calls["on_save_checkpoint"] == 5
    assert calls[OURS] > 50
    hurt = Disturbance("exception", "training_step", 4)
    with pytest.raises(Hurt, match="in training_step"):
        watched(lambda: training.fit(tmp_path / "b"), hurt.strike)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {f"epoch=0-step={i}.ckpt" for i in (1, 2, 3)}


def test_states_are_compared_to_the_last_bit() -> None:
    left = {"a": [torch.tensor([1.0]), None], "b": (1, "x")}
    assert difference(left, {"a": [torch.tensor([1.0]), None], "b": (1, "x")}) is None
    assert difference(left, {"a": [torch.tensor([1.0 + 2**-23]), None], "b": (1, "x")}).startswith("/a/0 differs")
    assert difference(left, {"a": [torch.tensor([1.0]), None], "b": (1.0, "x")}).startswith("/b/0: 1 and 1.0")
    assert difference(left, {"a": left["a"]}) is not None


def test_the_table_counts_every_round() -> None:
    outcomes = [Outcome(0, "kill"), Outcome(1, "kill", Verdict.HANG), Outcome(2, "full disk", Verdict.SAID)]
    rows = [line.split() for line in table(outcomes).splitlines()]
    assert rows[1] == ["full", "disk", "-", "-", "1", "-", "-", "-"]
    assert rows[2] == ["kill", "1", "-", "-", "-", "-", "1"]
    assert rows[3] == ["all", "1", "0", "1", "0", "0", "1"]
    assert all(verdict in BAD for verdict in (Verdict.HANG, Verdict.DIFFERS, Verdict.WRONG_ERROR))
