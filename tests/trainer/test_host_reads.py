"""What the host reads of the device in a training with our callbacks, beyond the same training without them."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.trainer import metrics
from tests.device_calls import Calls, Late, as_on_a_gpu
from tests.engine.methods_table import METHODS
from tests.lightning_modules import LIGHTNING_WARNINGS, Automatic, Manual, batchnorm_net, loader, trainer
from tests.trainer.test_callbacks_training import scaled

pytestmark = [pytest.mark.usefixtures("on_a_gpu"), *(pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS)]

STEPS = 10  # and one that ends the tenth
CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "EntropySGD": lambda: le.EntropySGD(3, 0.5, 1e-2, seed=3),
    "HamiltonJacobi": lambda: le.HamiltonJacobi(3, 0.5, outer_momentum=0.5),
    "HeatSmoothing": lambda: le.HeatSmoothing(2, width=0.1, scale="relative", seed=3),
}


@pytest.fixture
def on_a_gpu() -> Iterator[None]:
    with as_on_a_gpu():
        yield


def reads(callbacks: list[L.Callback], module: Any, **options: Any) -> list[Counter[str]]:
    """What is waited for from the beginning of each training step to that of the next."""
    marks: list[Counter[str]] = []
    calls = Calls()
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        marks.append(calls.waits)
        return step(batch, batch_idx)

    module.training_step = training_step
    torch.manual_seed(0)
    with calls:
        trainer(callbacks=callbacks, max_steps=STEPS + 1, **options).fit(module, loader())
    assert len(marks) == STEPS + 1
    return [after - before for before, after in pairwise(marks)]


def own(make: Callable[[], list[L.Callback]], module: Callable[[], Any] = Automatic, **options: Any) -> list[int]:
    """How many times we make the host wait in each of ten steps."""
    made = {name: value() if callable(value) else value for name, value in options.items()}
    again = {name: value() if callable(value) else value for name, value in options.items()}
    with_us, without = reads(make(), module(), **made), reads([], module(), **again)
    return [(a - b).total() for a, b in zip(with_us, without, strict=True)]


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "float16": {"plugins": scaled},
}


@pytest.mark.parametrize("method", METHODS)
def test_no_step_of_any_method_waits(method: str) -> None:
    assert own(lambda: [le.InnerOuterCallback(METHODS[method], seed=3)]) == [0] * STEPS


@pytest.mark.parametrize("module", [Automatic, Manual])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_no_step_of_any_callback_waits(name: str, precision: str, module: Any) -> None:
    """Where a scaler skips steps, torch's own read of whether it does is the only one."""
    assert own(lambda: [CALLBACKS[name]()], module, **PRECISIONS[precision]) == [0] * STEPS


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_fused_optimizer_under_a_scaler_is_asked_once_whether_it_skips(name: str) -> None:
    """It skips by itself on the device, and torch does not ask; our step, and whether it counts, depend on it."""
    found = own(lambda: [CALLBACKS[name]()], lambda: Automatic("fused"), **PRECISIONS["float16"])
    assert found == [1] * STEPS


def test_batchnorm_is_refreshed_around_validations_alone_and_reads_once_more_than_torch() -> None:
    """torch reads each layer's counter at each batch of a plain average; we, at the end, which of them have one."""

    def net() -> Automatic:
        return Automatic(net=torch.nn.Sequential(batchnorm_net(), torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)))

    assert own(lambda: [le.RefreshBatchNorm(2)], net) == [0] * STEPS
    with Calls() as by_torch:
        torch.optim.swa_utils.update_bn(loader(8), net().net)
    module, quiet = net(), trainer(max_steps=1)
    quiet.fit(module, loader())
    with Calls() as calls:
        le.RefreshBatchNorm(2, dataloader=loader(8)).refresh(quiet, module)
    assert by_torch.waits["_local_scalar_dense"] >= 2 * 3
    assert calls.waits - by_torch.waits == {"tolist": 1}


class Log(DummyLogger):
    """What it was given, and the step at which."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    made: list[Late] = []

    def to_host(value: Tensor) -> tuple[Tensor, Late]:
        made.append(Late())
        return value.clone(), made[-1]

    monkeypatch.setattr(metrics, "to_host", to_host)
    return made


def ours(log: Log) -> list[int | None]:
    return [step for step, row in log.rows if "entropy/outer_step" in row]


def test_logging_an_outer_step_does_not_wait_for_it(events: list[Late]) -> None:
    log = Log()
    found = own(lambda: [CALLBACKS["EntropySGD"]()], logger=log, log_every_n_steps=1)
    # Outer steps are the third, sixth and ninth. A row of two distances is written a loop later, with the next.
    assert found == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]
    assert ours(log) == [2, 5, 8]  # the last when training ends
    assert len(events) == 6 and all(event.waited for event in events)
    assert all(row["entropy/inner_distance"] > 0 for _, row in log.rows if "entropy/outer_step" in row)


def test_what_has_arrived_is_logged_with_its_step_at_the_next_batch(events: list[Late]) -> None:
    log, seen = Log(), list[int]()

    class Arrive(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(len(ours(log)))
            for event in events:
                event.happened = True

    trainer(callbacks=[CALLBACKS["EntropySGD"](), Arrive()], max_steps=6, logger=log, log_every_n_steps=1).fit(
        Automatic(), loader()
    )
    assert seen == [0, 0, 0, 1, 1, 1] and ours(log) == [2, 5]
    assert not any(event.waited for event in events[:2])


@pytest.mark.parametrize("where", ["validation", "exception"])
def test_whoever_looks_finds_the_last_row(events: list[Late], where: str) -> None:
    log, seen = Log(), list[Any]()

    class Look(L.Callback):
        def on_validation_start(self, *_: Any) -> None:
            seen.append(ours(log))

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if where == "exception" and trainer.global_step == 4:
                raise KeyError("lost")

    run = trainer(
        callbacks=[CALLBACKS["EntropySGD"](), Look()],
        max_steps=4,
        logger=log,
        log_every_n_steps=1,
        limit_val_batches=1,
        val_check_interval=4,
    )
    if where == "exception":
        with pytest.raises(KeyError):
            run.fit(Automatic(), loader(), loader())
        assert ours(log) == [2]
    else:
        run.fit(Automatic(), loader(), loader())
        assert seen[0] == [2]
