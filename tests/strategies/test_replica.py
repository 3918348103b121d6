"""Replicas against the literal references, in their limits, and where one of them goes wrong."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.strategies import exchange
from lightning_entropy.strategies.options import SEED_STRIDE
from tests import reference
from tests.device_calls import late_copy
from tests.strategies.runs import FORK_WARNINGS, Net, Record, data, fit, strategy

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


BATCH = 8

STEPS = 16  # of two epochs


def batches(seen: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The mini-batches of which a rank asked for the samples, in its order."""
    inputs, targets = data()
    return [(inputs[seen[i : i + BATCH]], targets[seen[i : i + BATCH]]) for i in range(0, STEPS * BATCH, BATCH)]


def grad(params: list[Tensor], batch: Any) -> list[Tensor]:
    net = Net().net
    names = [name for name, _ in net.named_parameters()]
    leaves = [p.clone().requires_grad_() for p in params]
    out = torch.func.functional_call(net, dict(zip(names, leaves, strict=True)), (batch[0],))
    return list(torch.autograd.grad(torch.nn.functional.cross_entropy(out, batch[1]), leaves))


def start(n: int) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in Net().parameters()] for _ in range(n)]


def assert_same(ours: list[list[Tensor]], theirs: list[list[Tensor]], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


SGD = reference.SGD(0.1, 0.9, True)

SCOPED: dict[str, Any] = {"gamma": le.Scoping(0.01, 0.1, limit=1.0), "rho": le.Scoping(0.1, 0.1, limit=1.0)}


def theirs(method: str, n: int, own: list[Any]) -> Any:
    if method in ("anchor", "average"):
        return reference.parle(
            start(n), grad, batches=own, outer_steps=4, inner_steps=4, inner_lr=0.1, outer_lr=0.1,
            gamma=reference.scoping(0.01, 0.1, 1.0), rho=reference.scoping(0.1, 0.1, 1.0),
            form="paper" if method == "anchor" else "code", start=0,
        )  # fmt: skip
    if method == "elastic_sgd":
        return reference.elastic_sgd(start(n), grad, batches=own, outer_steps=4, inner_steps=4, rho=0.3, optimizer=SGD)
    kind = getattr(reference, method)
    return kind(start(n)[0], grad, batches=own, outer_steps=4, inner_steps=4, optimizer=SGD)


OURS = {
    "anchor": le.parle(4, **SCOPED, coupled=True, outer_lr=0.1, outer_momentum=0.9),
    "average": le.parle(4, **SCOPED, coupled=True, outer_lr=0.1, outer_momentum=0.9, elastic_target="average"),
    "elastic_sgd": le.elastic_sgd(4, 0.3),
    "local_sgd": le.local_sgd(4),
    "diloco": le.diloco(4),
}
STREAMING = le.streaming_diloco(4, 2, 1)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("method", OURS)
def test_replicas_are_the_reference(tmp_path: Path, method: str, n: int) -> None:
    ranks = fit(tmp_path, strategy(OURS[method]), n)
    own = [batches(rank["seen"]) for rank in ranks]
    paths = theirs(method, n, own)
    for rank, path in zip(ranks, paths, strict=True):
        assert_same(rank["anchors"], path.anchors, 1e-10)
    mean = reference.consensus(paths)[-1]
    for rank in ranks:
        torch.testing.assert_close(list(rank["final"].values()), mean, rtol=0, atol=1e-10)
    if method in ("local_sgd", "diloco"):
        for rank in ranks[1:]:
            assert_same(rank["anchors"], ranks[0]["anchors"], 0)
    assert any(left != right for left, right in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True))


FRAGMENTS = {1: [[0, 1, 2, 3]], 2: [[0], [1, 2, 3]], 3: [[0], [1, 2], [3]]}  # of Net: 35, 7, 21 and 3 weights


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("fragments", "delay", "mixing"), [(1, 0, 0.5), (1, 2, 0.5), (2, 0, 0.0), (2, 1, 0.5), (2, 4, 0.3), (3, 2, 0.5)]
)
def test_streaming_replicas_are_the_reference(
    tmp_path: Path, fragments: int, delay: int, mixing: float, overlap: bool
) -> None:
    """At every step, in loops of five: two and three fragments do not divide them, a delay of four is longer."""
    method = le.streaming_diloco(5, fragments, delay, mixing)
    ranks = fit(tmp_path, strategy(method, overlap=overlap), 2, max_steps=STEPS)
    paths = reference.streaming_diloco(
        start(1)[0], grad, batches=[batches(rank["seen"]) for rank in ranks], steps=STEPS, inner_steps=5,
        fragments=FRAGMENTS[fragments], delay=delay, mixing=mixing, optimizer=SGD,
    )  # fmt: skip
    for rank, path in zip(ranks, paths, strict=True):
        assert_same(rank["iterates"][:-1], path.iterates[0][:-1], 1e-10)  # the loops are closed in the last
        assert_same(rank["anchors"][:3], path.anchors[4::5], 1e-10)
    assert_same(ranks[0]["anchors"], ranks[1]["anchors"], 0)
    assert all(torch.equal(a, b) for a, b in zip(*(rank["final"].values() for rank in ranks), strict=True))


def test_without_elasticity_replicas_are_independent_runs(tmp_path: Path) -> None:
    """Bit for bit: each is a plain loop over its own batches, with noise of its own."""
    relaxation = le.entropy_sgd(4, 0.3, 1e-2)
    for rank, recorded in enumerate(fit(tmp_path, strategy(relaxation), 3)):
        module = Net()
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, nesterov=True)
        le.relax(optimizer, relaxation, seed=7 + rank * SEED_STRIDE)
        iterates = []
        for batch in batches(recorded["seen"]):
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            iterates.append([p.detach().clone() for p in module.parameters()])
        assert_same(recorded["iterates"], iterates, 0)


@pytest.mark.parametrize("relaxation", [le.parle(4, 0.1, 0.3), le.elastic_sgd(4, 0.3), le.local_sgd(4), STREAMING])
def test_one_replica_is_the_callback(tmp_path: Path, relaxation: le.Relaxation) -> None:
    ours = fit(tmp_path / "ours", strategy(relaxation), 1)
    callback = fit(tmp_path / "callback", "ddp_fork", 1, callbacks=[le.InnerOuterCallback(relaxation)])
    assert_same(ours[0]["iterates"], callback[0]["iterates"], 0)
    assert all(torch.equal(v, callback[0]["final"][k]) for k, v in ours[0]["final"].items())


@pytest.mark.parametrize("relaxation", [le.parle(4, 0.1, 0.5), le.streaming_diloco(4, 2, 3)])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_overlapped_and_blocking_are_the_same_bits(tmp_path: Path, format: Any, relaxation: le.Relaxation) -> None:
    both = [
        fit(tmp_path / str(overlap), strategy(relaxation, overlap=overlap, communication_dtype=format), 3)
        for overlap in (True, False)
    ]
    for left, right in zip(*both, strict=True):
        assert_same(left["iterates"], right["iterates"], 0)
        assert_same(left["anchors"], right["anchors"], 0)


@pytest.mark.filterwarnings("ignore:offload_anchor=True gains nothing")
@pytest.mark.parametrize("relaxation", [le.elastic_sgd(4, 0.5), le.diloco(4), le.streaming_diloco(4, 2, 1)])
def test_offloaded_or_not_is_the_same_bits(tmp_path: Path, relaxation: le.Relaxation) -> None:
    both = [fit(tmp_path / str(on), strategy(relaxation, offload_anchor=on), 2) for on in (True, False)]
    for left, right in zip(*both, strict=True):
        assert_same(left["iterates"], right["iterates"], 0)
        assert_same(left["anchors"], right["anchors"], 0)
        assert all(torch.equal(v, right["final"][k]) for k, v in left["final"].items())


@pytest.mark.parametrize("relaxation", [OURS["anchor"], OURS["diloco"], STREAMING])
def test_two_by_two_is_two_by_one_with_twice_the_batch(tmp_path: Path, relaxation: le.Relaxation) -> None:
    small = fit(tmp_path / "2x2", strategy(relaxation, replicas=2), 4, make=lambda: Net(batch=4))
    large = fit(tmp_path / "2x1", strategy(relaxation), 2)
    for rank in range(4):
        assert_same(small[rank]["anchors"], large[rank // 2]["anchors"], 1e-10)
        assert_same(small[rank]["anchors"], small[rank // 2 * 2]["anchors"], 0)


def test_one_replica_of_two_ranks_is_ddp_with_the_callback(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"make": partial(Net, batch=4)}
    ours = fit(tmp_path / "ours", strategy(PARLE4, replicas=1, data="shard"), 2, **kwargs)
    ddp = fit(tmp_path / "ddp", "ddp_fork", 2, callbacks=[le.InnerOuterCallback(PARLE4)], **kwargs)
    for left, right in zip(ours, ddp, strict=True):
        assert left["seen"] == right["seen"]
        for a, b in zip(left["iterates"], right["iterates"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


PARLE4 = le.parle(4, 0.1, 0.3, 0.25)


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
    ranks = fit(tmp_path, strategy(PARLE4), 2, callbacks=[Skip()], plugins=[precision])
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


PARLE = le.parle(3, 0.1, 0.3, 0.25)


class Poisons(L.Callback):
    """A loss that is nan, once, on one rank."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            with torch.no_grad():
                for p in pl_module.parameters():
                    if p.grad is not None:
                        p.grad.fill_(float("nan"))
                for b in pl_module.buffers():
                    if b.is_floating_point():
                        b.fill_(float("nan"))

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step + 2:  # the next loop begins
            record = next(c for c in trainer.callbacks if isinstance(c, Record))  # type: ignore[attr-defined]
            record.extra["started"] = [p.detach().clone() for p in pl_module.parameters()]


@pytest.mark.parametrize("format", ["float32", "int8", "int4"])
@pytest.mark.parametrize("method", ["anchor", "average", "diloco", "streaming"])
@pytest.mark.filterwarnings("ignore:replica 1 has nan or inf")
def test_a_nan_is_left_out_and_put_back(tmp_path: Path, method: str, format: Any) -> None:
    common = {"diloco": le.diloco(3), "streaming": le.streaming_diloco(5, 2, 1)}
    relaxation = common.get(method) or le.parle(3, 0.1, 0.3, elastic_target=method)  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {"make": lambda: Net(bn=True), "limit_val_batches": 2}
    ranks = fit(tmp_path, strategy(relaxation, communication_dtype=format), 3, callbacks=[Poisons(1, 4)], **kwargs)
    for rank in ranks:
        assert all(torch.isfinite(x).all() for step in rank["anchors"] for x in step) or rank is ranks[1]
        assert all(torch.isfinite(v).all() for v in rank["final"].values())
    # It is poisoned at step 5 of the second loop, and trains on from the others' mean after that loop. Streaming in
    # loops of five, it is so when a fragment's exchange begins, after step 7.
    # In int8 and int4 an exchange has two halves, and it takes the step after to come back.
    poisoned = ranks[1]["iterates"]
    assert not torch.isfinite(poisoned[4][0]).all()
    assert all(torch.isfinite(y).all() for step in poisoned[6 if format == "float32" else 9 :] for y in step)
    assert torch.isfinite(torch.tensor(list(ranks[0]["metrics"].values()))).all()
    if method in common:  # all replicas take the same outer steps, with the same momentum
        assert_same(ranks[1]["anchors"], ranks[0]["anchors"], 0)
    if format == "float32" and method == "anchor":
        others = [(a + b) / 2 for a, b in zip(ranks[0]["anchors"][1], ranks[2]["anchors"][1], strict=True)]
        torch.testing.assert_close(ranks[1]["started"], others, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("patience", "back"), [(1, 7), (math.inf, 9)])
@pytest.mark.parametrize("method", ["anchor", "diloco", "streaming"])
@pytest.mark.filterwarnings("ignore:replica 1 has nan or inf")
def test_where_a_device_tells_late_it_is_put_back_as_soon_as_the_host_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, patience: float, back: int
) -> None:
    """When the copy has arrived, asked for after each step, and at the latest when the exchange is used."""
    monkeypatch.setattr(exchange, "to_host", partial(late_copy, patience=patience))
    common = {"diloco": le.diloco(3), "streaming": le.streaming_diloco(5, 2, 1)}
    relaxation = common.get(method) or le.parle(3, 0.1, 0.3)
    ranks = fit(tmp_path, strategy(relaxation), 3, callbacks=[Poisons(1, 4)])
    poisoned = ranks[1]["iterates"]
    assert not torch.isfinite(poisoned[4][0]).all()
    assert all(torch.isfinite(y).all() for step in poisoned[back:] for y in step)
    if method == "anchor":
        assert not torch.isfinite(poisoned[back - 2][0]).all()
    else:
        assert_same(ranks[1]["anchors"], ranks[0]["anchors"], 0)


class Freezes(L.Callback):
    """The first layer stays as it is."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(False)


@pytest.mark.parametrize("relaxation", [le.diloco(3), le.streaming_diloco(5, 2, 1)])
@pytest.mark.filterwarnings("ignore:replica 1 has nan or inf")
def test_a_nan_beside_frozen_weights(tmp_path: Path, relaxation: le.Relaxation) -> None:
    ranks = fit(tmp_path, strategy(relaxation), 2, callbacks=[Freezes(), Poisons(1, 4)])
    assert_same(ranks[1]["anchors"], ranks[0]["anchors"], 0)
    assert all(torch.isfinite(y).all() for step in ranks[1]["iterates"][6:] for y in step)


def test_a_nan_is_said(tmp_path: Path) -> None:
    # Warnings are errors here, in the children too.
    with pytest.raises(Exception, match=r"replica 1 has nan or inf in its weights at outer step 2: it is left out"):
        fit(tmp_path, strategy(PARLE), 2, callbacks=[Poisons(1, 4)])


@pytest.mark.filterwarnings("ignore:replica . has nan or inf")
def test_nan_everywhere_is_an_error(tmp_path: Path) -> None:
    callbacks: list[L.Callback] = [Poisons(0, 4), Poisons(1, 4)]
    with pytest.raises(Exception, match="the weights of every replica are nan or inf"):
        fit(tmp_path, strategy(PARLE), 2, callbacks=callbacks)


class Single(Net):
    """In float32, which the compiled step is for."""

    def __init__(self) -> None:
        super().__init__()
        self.float()

    def training_step(self, batch: Any, i: int) -> Tensor:
        return super().training_step((batch[0].float(), batch[1]), i)


@pytest.mark.compiler
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_compiled_step_has_the_same_numbers_but_for_its_noise(tmp_path: Path, noise: float) -> None:
    method = le.parle(4, outer_lr=0.1, outer_momentum=0.9) if not noise else le.entropy_sgd(4, noise=noise)
    eager, compiled = (
        fit(tmp_path / str(on), strategy(method, compile=on), 2, make=Single, max_epochs=1)[0]["final"]
        for on in (False, True)
    )
    same = [torch.allclose(eager[name], compiled[name], rtol=1e-5, atol=1e-6) for name in eager]
    assert all(same) if not noise else not any(same)
