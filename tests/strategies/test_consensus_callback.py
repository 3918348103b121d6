"""A strategy acts before every callback, and after them where replicas stop together."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_entropy.strategies.consensus_callback import AfterCallbacks, ShowConsensus, acts, put_around


def around(*callbacks: Callback, together: bool) -> Any:
    trainer: Any = SimpleNamespace(callbacks=list(callbacks))
    put_around(trainer, cast(Any, object()), together=together)
    return trainer


@pytest.mark.parametrize(
    ("together", "kinds"),
    [(False, [ShowConsensus, ModelCheckpoint]), (True, [ShowConsensus, ModelCheckpoint, AfterCallbacks])],
)
def test_it_is_the_first_and_the_last(together: bool, kinds: list[type]) -> None:
    trainer = around(ModelCheckpoint(), together=together)
    assert [type(callback) for callback in trainer.callbacks] == kinds
    put_around(trainer, cast(Any, object()), together=together)  # another fit
    assert [type(callback) for callback in trainer.callbacks] == kinds


def test_in_a_finders_trial_it_does_not_act() -> None:
    trainer = around(together=False)
    assert acts(trainer)
    trainer.callbacks = []
    assert not acts(trainer)


@pytest.mark.parametrize("other", [EMAWeightAveraging(), StochasticWeightAveraging(0.1)])
def test_other_averages_are_refused(other: Callback) -> None:
    with pytest.raises(MisconfigurationException, match=f"{type(other).__name__} would put the average"):
        around(other, together=False)


def test_what_asks_all_ranks_every_batch_is_said_where_it_ties_replicas() -> None:
    timed = ModelCheckpoint(train_time_interval=timedelta(minutes=1))
    around(timed, together=False)
    with pytest.warns(UserWarning, match="ties the replicas"):
        around(timed, together=True)
