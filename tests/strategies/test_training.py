"""What replicas see, start from, log and count."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

import lightning_entropy as le
from lightning_entropy.strategies.lightning_internals import GroupSyncBatchNorm
from lightning_entropy.strategies.start import initialize_apart
from tests.strategies.runs import FORK_WARNINGS, SAMPLES, Net, external, fit, strategy, trainer

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]

PARLE = le.parle(4, 0.1, 0.3, 0.25)


def epochs(rank: dict[str, Any], length: int) -> list[list[int]]:
    seen = rank["seen"]
    return [seen[i : i + length] for i in range(0, 2 * length, length)]


def test_every_replica_sees_all_data_in_its_own_order(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(PARLE, replicas=2), 4, make=partial(Net, batch=4))
    orders = [epochs(rank, SAMPLES // 2) for rank in ranks]
    for epoch in range(2):
        whole = [sorted(orders[a][epoch] + orders[a + 1][epoch]) for a in (0, 2)]
        assert whole == [list(range(SAMPLES))] * 2
        assert orders[0][epoch] != orders[2][epoch]
    assert orders[0][0] != orders[0][1]


def test_shards_are_disjoint(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(PARLE, data="shard"), 2)
    for epoch in range(2):
        halves = [epochs(rank, SAMPLES // 2)[epoch] for rank in ranks]
        assert sorted(halves[0] + halves[1]) == list(range(SAMPLES))


def test_validation_is_shared_among_all_ranks(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(PARLE), 2, limit_val_batches=10, callbacks=[Evaluated()])
    assert [rank["batches"] for rank in ranks] == [1, 1]  # of two


class Evaluated(L.Callback):
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
        record.extra["batches"] = trainer.num_val_batches[0]


class Draws(L.Callback):
    """What this rank's generators give in the first batch."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            import random

            import numpy as np

            record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
            record.extra["draws"] = [torch.rand(()).item(), np.random.rand(), random.random()]


def test_random_numbers_differ_between_replicas_and_agree_inside(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(le.entropy_sgd(4, 0.1, 0.5), replicas=2), 4, callbacks=[Draws()])
    assert ranks[0]["draws"] == ranks[1]["draws"]
    assert ranks[2]["draws"] == ranks[3]["draws"]
    assert all(a != b for a, b in zip(ranks[0]["draws"], ranks[2]["draws"], strict=True))
    for a, b in ((0, 1), (2, 3)):  # noise: DDP never puts the weights of a replica's ranks together again
        for left, right in zip(ranks[a]["iterates"], ranks[b]["iterates"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


class First(L.Callback):
    """The weights as training finds them."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
        record.extra["first"] = [p.detach().clone() for p in pl_module.parameters()]


@pytest.mark.parametrize("apart", [False, True])
def test_where_replicas_start(tmp_path: Path, apart: bool) -> None:
    ranks = fit(tmp_path, strategy(PARLE, replicas=2, independent_init=apart), 4, callbacks=[First()])
    built = list(Net().parameters())
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["first"], built, strict=True))
    for rank in (1, 2, 3):
        same = [torch.equal(a, b) for a, b in zip(ranks[rank]["first"], ranks[0]["first"], strict=True)]
        assert all(same) if rank == 1 or not apart else not any(same)
    assert all(torch.equal(a, b) for a, b in zip(ranks[2]["first"], ranks[3]["first"], strict=True))


def test_weights_of_its_own_need_a_way_to_draw_them() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

    with pytest.raises(Exception, match=r"independent_init needs reset_parameters\(\) .* 'odd' \(Odd\) has none"):
        initialize_apart(torch.nn.ModuleDict({"odd": Odd()}), 0)
    linear, state = torch.nn.Linear(2, 2), torch.get_rng_state()
    before = linear.weight.detach().clone()
    initialize_apart(linear, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(linear.weight, before)


def test_sync_batchnorm_stays_inside_a_replica(tmp_path: Path) -> None:
    """Its layers need a GPU, so here one looks at the groups that they would get."""

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        own = strategy(PARLE, start_method="popen")  # one rank a replica: ordinary layers
        trainer(tmp_path, own, 4, sync_batchnorm=True).fit(Net(bn=True))
        assert own._layer_sync is None
        own = strategy(PARLE, replicas=2, start_method="popen")
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            trainer(tmp_path, own, 4, sync_batchnorm=True).fit(Net(bn=True))
        assert isinstance(own._layer_sync, GroupSyncBatchNorm)
        layer: Any = own._layer_sync.apply(torch.nn.BatchNorm1d(3))
        replica = rank // 2
        assert torch.distributed.get_process_group_ranks(layer.process_group) == [2 * replica, 2 * replica + 1]

    assert external(4, work) == [""] * 4


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_what_is_logged(tmp_path: Path, format: Any) -> None:
    fit(
        tmp_path,
        strategy(le.parle(4, le.Scoping(0.1, 0.5), 0.3), communication_dtype=format),
        2,
        logger=CSVLogger(tmp_path, "logs", "0"),
        log_every_n_steps=4,
        max_epochs=4,
    )
    lines = (tmp_path / "logs" / "0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["entropy/outer_step"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11, 15, 19, 23, 27, 31]
    for t, row in enumerate(rows):
        assert float(row["entropy/gamma"]) == pytest.approx(0.1 * 1.5**t)
        assert float(row["entropy/rho"]) == 0.3
        assert float(row["entropy/effective_epochs"]) == (t + 1) / 2
        assert float(row["entropy/seconds_waited"]) > 0
    # The replicas start together; their distance is known a round later.
    spreads = [float(row["entropy/spread"]) for row in rows if row["entropy/spread"]]
    assert spreads[0] == 0
    assert all(0 < s < 1 for s in spreads[1:])
    weights = sum(p.numel() for p in Net().parameters())
    sent = float(rows[-1]["entropy/bytes_per_step"])
    # The weights are float64, which goes as it is; rounded, there is a block for each of the two.
    payload = {"float32": 8 * weights, "bfloat16": 2 * 2 * 1024, "int8": 2 * (1024 + 4)}[format]
    assert sent == pytest.approx((payload + 8) / 4)


class Scaler:
    """Stands for a gradient scaler: skips an update when told to."""

    def __init__(self) -> None:
        self.skip = False

    def scale(self, loss: Any) -> Any:
        return loss

    def unscale_(self, optimizer: Any) -> None:
        pass

    def step(self, optimizer: Any, **kwargs: Any) -> Any:
        return None if self.skip else optimizer.step(**kwargs)

    def update(self) -> None:
        self.skip = False

    def state_dict(self) -> dict[str, Any]:
        return {}


class Skip(L.Callback):
    """Skip three updates of rank 1, among them the last of a loop."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        plugin: Any = trainer.precision_plugin
        plugin.scaler.skip = trainer.global_rank == 1 and trainer.global_step in (2, 3, 9)


def test_replicas_stay_in_step_when_a_scaler_skips_one_of_them(tmp_path: Path) -> None:
    scaler: Any = Scaler()
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    ranks = fit(tmp_path, strategy(PARLE), 2, callbacks=[Skip()], plugins=[precision])
    assert [len(rank["anchors"]) for rank in ranks] == [4, 4]
    assert torch.equal(ranks[1]["iterates"][1][0], ranks[1]["iterates"][2][0])
    assert not torch.equal(ranks[0]["iterates"][1][0], ranks[0]["iterates"][2][0])
    assert torch.equal(ranks[0]["final"]["net.0.weight"], ranks[1]["final"]["net.0.weight"])


class Thaws(L.Callback):
    """The first layer is frozen for the first epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(trainer.current_epoch > 0)


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_parameters_that_are_unfrozen_later(tmp_path: Path, format: Any) -> None:
    ranks = fit(
        tmp_path, strategy(le.parle(3, 0.1, 0.3), communication_dtype=format), 2, callbacks=[Thaws()], max_epochs=3
    )
    frozen = ranks[0]["iterates"][7][0]
    assert torch.equal(frozen, Net().net[0].weight)  # type: ignore[index]
    assert not torch.equal(ranks[0]["iterates"][-1][0], frozen)
    assert all(torch.equal(a, b) for a, b in zip(*(rank["final"].values() for rank in ranks), strict=True))


def test_one_replica_of_two_ranks_is_ddp_with_the_callback(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"make": partial(Net, batch=4)}
    ours = fit(tmp_path / "ours", strategy(PARLE, replicas=1, data="shard"), 2, **kwargs)
    ddp = fit(tmp_path / "ddp", "ddp_fork", 2, callbacks=[le.InnerOuterCallback(PARLE)], **kwargs)
    for left, right in zip(ours, ddp, strict=True):
        assert left["seen"] == right["seen"]
        for a, b in zip(left["iterates"], right["iterates"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
