"""Processes against the literal references, and what the strategy is in its limits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.strategies.options import SEED_STRIDE
from tests import reference
from tests.strategies.runs import FORK_WARNINGS, Net, data, fit, strategy

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]

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


@pytest.mark.parametrize("relaxation", [le.parle(4, 0.1, 0.3), le.elastic_sgd(4, 0.3), le.local_sgd(4)])
def test_one_replica_is_the_callback(tmp_path: Path, relaxation: le.Relaxation) -> None:
    ours = fit(tmp_path / "ours", strategy(relaxation), 1)
    callback = fit(tmp_path / "callback", "ddp_fork", 1, callbacks=[le.InnerOuterCallback(relaxation)])
    assert_same(ours[0]["iterates"], callback[0]["iterates"], 0)
    assert all(torch.equal(v, callback[0]["final"][k]) for k, v in ours[0]["final"].items())


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_overlapped_and_blocking_are_the_same_bits(tmp_path: Path, format: Any) -> None:
    relaxation = le.parle(4, 0.1, 0.5)
    both = [
        fit(tmp_path / str(overlap), strategy(relaxation, overlap=overlap, communication_dtype=format), 3)
        for overlap in (True, False)
    ]
    for left, right in zip(*both, strict=True):
        assert_same(left["iterates"], right["iterates"], 0)
        assert_same(left["anchors"], right["anchors"], 0)


@pytest.mark.parametrize("method", ["anchor", "diloco"])
def test_two_by_two_is_two_by_one_with_twice_the_batch(tmp_path: Path, method: str) -> None:
    small = fit(tmp_path / "2x2", strategy(OURS[method], replicas=2), 4, make=lambda: Net(batch=4))
    large = fit(tmp_path / "2x1", strategy(OURS[method]), 2)
    for rank in range(4):
        assert_same(small[rank]["anchors"], large[rank // 2]["anchors"], 1e-10)
        assert_same(small[rank]["anchors"], small[rank // 2 * 2]["anchors"], 0)


@pytest.mark.parametrize(("format", "most"), [("bfloat16", 2e-3), ("int8", 2e-3)])
@pytest.mark.parametrize("n", [2, 3])
def test_compression_stays_near_the_exact_run(tmp_path: Path, format: Any, most: float, n: int) -> None:
    relaxation = le.elastic_sgd(2, 0.5)
    exact = fit(tmp_path / "exact", strategy(relaxation), n, max_epochs=4)
    near = fit(tmp_path / format, strategy(relaxation, communication_dtype=format), n, max_epochs=4)
    for left, right in zip(exact, near, strict=True):
        for x, y in zip(left["anchors"][-1], right["anchors"][-1], strict=True):
            assert 0 < (x - y).abs().max() < most
