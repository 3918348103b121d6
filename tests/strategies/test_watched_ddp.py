"""DDP that names the rank that is gone, and waits for nobody after an exception."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_entropy.strategies.liveness import Heartbeat, ReplicaLost
from lightning_entropy.strategies.watched_ddp import WatchedDDPStrategy

COLLECTIVES: list[tuple[str, Any]] = [("barrier", None), ("broadcast", 5), ("reduce", torch.ones(2))]


class KnowsWhoIsGone:
    meeting = Heartbeat.meeting
    _at = ""

    def named(self, error: RuntimeError) -> RuntimeError:
        return ReplicaLost(f"rank 1 is gone: {error}") if "closed" in str(error) else error


@pytest.fixture
def strategy(monkeypatch: pytest.MonkeyPatch) -> WatchedDDPStrategy:
    """A strategy whose every collective fails."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("connection closed")

    for name, _ in COLLECTIVES:
        monkeypatch.setattr(DDPStrategy, name, fails)
    own: Any = WatchedDDPStrategy()
    own._heartbeat = KnowsWhoIsGone()
    return own


@pytest.mark.parametrize(("name", "value"), COLLECTIVES)
def test_errors_of_collectives_name_the_rank(strategy: Any, name: str, value: Any) -> None:
    with pytest.raises(ReplicaLost, match=r"^rank 1 is gone: connection closed$") as caught:
        getattr(strategy, name)(value)
    assert str(caught.value.__cause__) == "connection closed"


@pytest.mark.parametrize(("name", "value"), COLLECTIVES)
def test_without_a_rank_that_is_gone_the_error_stays(strategy: Any, name: str, value: Any) -> None:
    strategy._heartbeat = None
    with pytest.raises(RuntimeError, match=r"^connection closed$") as caught:
        getattr(strategy, name)(value)
    assert type(caught.value) is RuntimeError


def test_after_an_exception_there_are_no_collectives(strategy: Any) -> None:
    module = L.LightningModule()
    strategy._lightning_module = module
    with pytest.raises(ReplicaLost):
        strategy.barrier()  # the module is not attached yet
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    with pytest.raises(ReplicaLost):
        strategy.barrier()
    module.trainer.state.status = TrainerStatus.INTERRUPTED
    assert strategy.barrier() is None
    assert strategy.broadcast(5) == 5
    assert strategy.reduce(COLLECTIVES[2][1]) is COLLECTIVES[2][1]
    assert strategy.reduce_boolean_decision(True) is True
    assert strategy.reduce_boolean_decision(False) is False


@pytest.mark.parametrize(
    ("exception", "message"),
    [
        (RuntimeError("connection closed"), "rank 1 is gone: connection closed"),
        (RuntimeError("out of memory"), "out of memory"),
        (ValueError("closed"), "closed"),
    ],
)
def test_the_exception_that_ends_a_training_names_the_rank(strategy: Any, exception: Exception, message: str) -> None:
    strategy.on_exception(exception)
    assert str(exception) == message
