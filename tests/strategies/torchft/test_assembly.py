"""Who meets, who is lost, who joins, and for whom one waits."""

import pytest

from tests.strategies.torchft.meetings import Met

pytest.importorskip("torchft")

pytestmark = pytest.mark.processes


def test_one_of_three_is_killed_in_a_meeting_and_the_next_is_of_two(met: Met) -> None:
    result, said = met("killed")
    assert result["codes"] == [0, 0, -9]
    for replica in (0, 1):
        got = result["got"][str(replica)]
        means = [entry["mean"] for entry in got]
        lost = means.index(None)
        assert means[lost - 1] == 2.0 and got[lost - 1]["present"] == [0, 1, 2]
        assert set(means[lost + 1 :]) == {1.5} and got[-1]["present"] == [0, 1]
        assert f"replica {replica} has lost a peer in a meeting and goes on without its result" in said


def test_one_that_fails_in_a_meeting_lets_the_others_know_at_once(met: Met) -> None:
    result, _ = met("fails_alone")
    assert result["lost"] == [None] * 4 and result["seconds"] < 15
    assert result["next"] == [[[1.5, 1.5]]] * 4


def test_who_waits_hears_of_whatever_has_ended_a_meeting(met: Met) -> None:
    assert met("panics")[0] == "a panic"


def test_a_replica_that_joins_gets_the_state_and_is_counted_in_no_mean_before(met: Met) -> None:
    result, _ = met("join")
    assert result["together"] == [[5.0]] and result["present"] == [0, 1]
    assert result["wanted"] and result["got"] == [[5.0], 3]
    assert result["later"] == [[6.0]]


def test_fewer_than_min_replicas_wait_and_say_so(met: Met) -> None:
    result, said = met("too_few")
    assert result == {"waits": True, "totals": [[2.0], [2.0]]}
    assert "2 replicas are needed (min_replicas), 1 is here" in said


def test_one_that_trains_another_model_is_told_and_the_others_go_on(met: Met) -> None:
    result, _ = met("another_model")
    assert result[0].startswith("replicas must train the same model, got 5 numbers of 4 bytes in replica 0 and 4")
    assert result[1:] == [[[1.5, 1.5]], [[1.5, 1.5]]]


def test_a_meeting_to_which_nobody_comes_can_be_left(met: Met) -> None:
    assert met("closed")[0] == {"over": True, "error": "Closed"}


def test_without_a_lighthouse_the_error_says_what_to_start(met: Met) -> None:
    assert "start one with torchft_lighthouse" in met("no_lighthouse")[0]
