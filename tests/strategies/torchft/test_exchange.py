"""The mean over the replicas that meet."""

import pytest

from tests.strategies.torchft.meetings import Met

pytest.importorskip("torchft")

pytestmark = pytest.mark.processes


def test_the_mean_is_of_what_is_finite_and_buffers_travel_with_it(met: Met) -> None:
    result, _ = met("exact")
    assert result["whole"] == [[[2.0, 4.0, 6.0]]] * 3  # of 1, 2 and 3 times (1, 2, 3)
    assert result["extras"] == [[4.0]] * 3  # of inf, 2 and 6
    assert result["nan"] == [[[2.0, 4.0, 6.0]]] * 3  # without the second, which has a nan
    # Of the round before: (1, 2, 3) from the mean twice, whose rms is (14 / 3)^(1/2); one does not count this time.
    assert result["spread"] == [pytest.approx((14 / 3) ** 0.5)] * 3


def test_one_that_has_missed_common_steps_catches_up_and_its_own_counts(met: Met) -> None:
    result, _ = met("behind")
    assert result["taken"][1] == [10.0, 10.0]
    # Where the first has not heard in time that both took the step, it is behind in turn, and takes it at the next.
    assert result["taken"][0] in (None, [11.0, 11.0])
    assert result["means"] == [[[0.5, 0.5]]] * 2
    assert result["versions"] == [8, 8]
