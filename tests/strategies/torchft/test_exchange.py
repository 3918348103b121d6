"""The mean over the replicas that meet."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lightning_entropy.strategies.torchft import exchange
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.encounter import Encounter
from lightning_entropy.strategies.torchft.exchange import ElasticCoupling
from lightning_entropy.strategies.torchft.records import Met as Meeting
from lightning_entropy.strategies.torchft.records import Record
from tests.device_calls import Calls, Late, late_copy
from tests.strategies.torchft.alone import Alone
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


RECORD = Record(0, False, 0, 3, False, "float32", 0, 0, -1, 1, "", 0)


def late_copies(value: Tensor) -> tuple[Tensor, Late]:
    return value.clone(), Late()


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_the_begin_reads_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch, format: Any) -> None:
    """Tensors on the device "meta" raise an error where a value is asked for."""
    monkeypatch.setattr(exchange, "to_host", late_copy)
    asked = list[dict[str, Any]]()
    assembly = Alone()
    monkeypatch.setattr(assembly, "exchange", lambda payload, **how: asked.append(how))
    extras = [torch.ones(2, device="meta"), torch.ones(0, device="meta"), torch.ones(5, device="meta")]
    coupling = ElasticCoupling(cast(Assembly, assembly), 0, format=format, extras=lambda: extras)
    for _ in range(2):
        with Calls() as calls:
            coupling([torch.ones(3, 4, device="meta"), torch.ones((), device="meta")])
        assert not calls.waits
        assert coupling.round is not None and coupling.round.finite is None
        coupling.distance = torch.ones((), device="meta")
    assert all(isinstance(how["ready"], Late) for how in asked)


@pytest.mark.parametrize("bad", [False, True])
def test_the_device_takes_out_what_is_not_finite_and_tells_the_host_late(
    monkeypatch: pytest.MonkeyPatch, bad: bool
) -> None:
    monkeypatch.setattr(exchange, "to_host", late_copies)
    sent = list[Tensor]()
    assembly = Alone()
    monkeypatch.setattr(assembly, "exchange", lambda payload, **how: sent.append(payload))
    extras = [torch.tensor([torch.nan, 1.0]), torch.tensor([2.0])]
    coupling = ElasticCoupling(cast(Assembly, assembly), 0, extras=lambda: extras)
    coupling.distance = torch.tensor(7.0)
    coupling([torch.tensor([1.0, torch.inf if bad else 3.0])])
    # The weights, both buffers, whether each of the three counts, and the distance.
    assert sent[0].tolist() == [*([0, 0] if bad else [1, 3]), 0, 0, 2, not bad, 0, 1, 0 if bad else 7]
    round = coupling.round
    assert round is not None and round.finite is None
    cast(Any, round)._event.happened = True
    assert round.finite is not bad


def test_who_sends_waits_for_the_device_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, seen = Late(), list[bool]()
    place = object.__new__(Assembly)
    vars(place).update(peers=SimpleNamespace(failures=0))

    def meet(self: Assembly, task: Encounter) -> Meeting:
        seen.append(ready.waited)
        return Meeting([RECORD], 0)

    monkeypatch.setattr(Assembly, "_meet", meet)
    task = Encounter(place, RECORD, torch.ones(3), None, ready=ready)
    assert not ready.waited
    place._play(task)
    assert seen == [True] and task.met is not None
