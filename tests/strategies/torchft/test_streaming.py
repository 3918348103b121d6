"""Replicas that come and go, and send their weights in parts, each some steps before its mean is used."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lightning_entropy as le
from lightning_entropy.strategies.torchft.records import Record, most_wanted
from tests.strategies.runs import external
from tests.strategies.torchft import meetings
from tests.strategies.torchft.alone import Replica
from tests.strategies.torchft.streaming import METHOD, SCENARIOS, STEPS, Training

pytest.importorskip("torchft")
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def met() -> meetings.Met:
    results, said = meetings.run(*SCENARIOS, module="streaming")
    return lambda name: (results[name], said)


@pytest.mark.parametrize(("scenario", "format"), [("exact", "float32"), ("rounded", "int4")])
def test_where_nobody_goes_the_weights_are_those_of_replicas_that_stay(
    met: meetings.Met, tmp_path: Path, scenario: str, format: str
) -> None:
    def rank(r: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=r, world_size=3, timeout=timedelta(seconds=20))
        t = Training(r, format=format, replicas=3)
        for _ in range(STEPS):
            t.step()
        torch.save((t.x(), t.y()), tmp_path / f"{r}.pt")

    assert external(3, rank) == [""] * 3
    result, _ = met(scenario)
    for r, (x, y) in enumerate(result):
        for ours, static in zip((x, y), torch.load(tmp_path / f"{r}.pt"), strict=True):
            for a, b in zip(ours, static, strict=True):
                torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-5)
    assert result[0][0] == result[1][0] == result[2][0]
    assert result[0][1] != result[1][1]  # y keeps its share


def test_one_that_is_killed_in_an_exchange_costs_the_others_its_mean_and_no_more(met: meetings.Met) -> None:
    result, _ = met("killed")
    assert result["codes"] == [0, 0, -9]
    first, second = result["got"]["0"], result["got"]["1"]
    assert first["present"] == second["present"] == [0, 1] and first["lost"] == second["lost"] == 1
    assert first["x"] == second["x"] and all(torch.tensor(x).isfinite().all() for x in first["x"])


def test_a_lost_exchange_is_made_up_at_the_fragments_next_one() -> None:
    """Every step is -0.1, outer steps are whole, and y begins again at x."""
    replica = Replica(le.streaming_diloco(4, 2, 1, 0.0, outer_lr=1.0, outer_momentum=0.0))
    loop = replica.loops.loops.loops[0]
    start = [p.detach().clone() for p in replica.module.parameters()]

    def come() -> list[float]:
        return [float((x - s).mean()) for x, s in zip(loop.anchor, start, strict=True)]

    replica.assembly.loses = True
    replica.train(4)
    assert come() == [0.0, 0.0]
    replica.assembly.loses = False
    replica.train(4)
    # The parts' exchanges begin after steps 1 and 3 of a loop: five and seven steps after the start.
    assert come() == pytest.approx([-0.5, -0.7], abs=1e-6)
    assert [coupling.version for coupling in replica.loops.couplings] == [1, 1]


@pytest.mark.parametrize("scenario", ["join", "join_untold"])
def test_one_that_joins_has_the_others_anchors_when_it_has_met_them(met: meetings.Met, scenario: str) -> None:
    result, _ = met(scenario)
    first, second, third = ({int(n): x for n, x in anchors.items()} for anchors in result["anchors"])
    begins, end = min(third), max(third)
    assert 7 <= begins < end - METHOD.inner_steps - METHOD.delay and first.keys() == second.keys()
    assert third[begins] == first[begins]
    # What is on its way when it joins is told; where it is not known yet, it is taken over at the next exchange.
    apart = [n for n in third if third[n] != first[n]]
    assert bool(apart) == (scenario == "join_untold")
    assert all(n < begins + METHOD.inner_steps + METHOD.delay for n in apart)
    assert all(first[n] == second[n] for n in first)
    assert first[end] != first[begins]
    assert len({tuple(versions) for versions in result["versions"]}) == 1


def test_one_that_is_out_of_step_waits_for_its_exchange_and_catches_up_from_one_that_has_come_to_it(
    met: meetings.Met,
) -> None:
    result, _ = met("out_of_step")
    assert result["means"] == [[[20.0] * 2, [2.0] * 2], *[[[2.5] * 2, [20.0] * 2, [2.0] * 2]] * 2]
    assert result["taken"][2] == [1, 0]  # of the second replica: the first was elsewhere
    assert result["said"] == [
        "replicas must have the same optimizers and fragments, got exchange 5 in replica 0 and none such in 10 rounds "
        "of most others"
    ]


def test_a_meeting_is_for_what_most_of_those_in_step_have_come_for() -> None:
    def record(replica: int, stream: int, version: int, in_step: bool = True) -> Record:
        return Record(replica, False, stream, 3, False, "float32", 0, 0, version, 1, "", 0, in_step)

    def stream(*records: Any) -> int:
        return most_wanted([record(i, *given) for i, given in enumerate(records)])[0]

    assert stream((1, 4), (0, 4), (1, 4)) == 1
    assert stream((1, 4, False), (0, 4), (1, 4, False)) == 0  # two that have come new
    assert stream((1, 4), (0, 4)) == 0 and stream((0, 5), (1, 4)) == 1  # whose turn is earlier
    assert stream((1, 4, False), (0, 5, False)) == 1
