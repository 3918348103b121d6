"""The Fabric sibling trains what the Trainer's strategy trains."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

import lightning_entropy as le
from lightning_entropy.strategies import fabric as fabric_strategy
from lightning_entropy.strategies.fabric import ElasticEntropyFabricStrategy
from tests.strategies.runs import FORK_WARNINGS, Net, Samples, data, external, fit, strategy

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]

PARLE = le.parle(3, 0.1, 0.3, 0.25)


def launch(own: Any, n: int) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=n, strategy=own)
    fabric.launch()
    return fabric


def train(fabric: Fabric, epochs: int, state: dict[str, Any] | None = None, module: Net | None = None) -> Any:
    """The Trainer's loop, by hand."""
    net = Net() if module is None else module
    optimizer: Any = net.configure_optimizers()
    model, optimizer = fabric.setup(net, optimizer)
    model.mark_forward_method("training_step")
    loader: Any = fabric.setup_dataloaders(DataLoader(Samples(), net.batch, shuffle=True))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            optimizer.zero_grad()
            fabric.backward(model.training_step(batch, i))
            optimizer.step()
    return net, model, optimizer


@pytest.mark.parametrize(
    ("relaxation", "n", "replicas"),
    [(PARLE, 2, "auto"), (PARLE, 4, 2), (PARLE, 1, 1), (le.streaming_diloco(4, 2, 3), 2, "auto")],
)
def test_fabric_is_the_trainer(tmp_path: Path, relaxation: le.Relaxation, n: int, replicas: Any) -> None:
    batch = 8 if n < 4 else 4

    def work(rank: int) -> None:
        seed_everything(7, verbose=False)
        own = ElasticEntropyFabricStrategy(relaxation, replicas=replicas)
        fabric = launch(own, n)
        net, _, _ = train(fabric, 2, module=Net(batch=batch))
        own.close_loops()
        with own.consensus():
            shown = {k: v.clone() for k, v in net.state_dict().items()}
        torch.save((shown, [p.detach().clone() for p in net.parameters()]), tmp_path / f"fabric.{rank}.pt")

    assert external(n, work) == [""] * n
    ranks = fit(tmp_path, strategy(relaxation, replicas=replicas), n, make=lambda: Net(batch=batch))
    for rank in range(n):
        shown, inner = torch.load(tmp_path / f"fabric.{rank}.pt", weights_only=True)
        assert all(torch.equal(v, ranks[rank]["final"][k]) for k, v in shown.items())
        assert all(torch.equal(a, b) for a, b in zip(inner, ranks[rank]["iterates"][-1], strict=True))


def test_fabric_goes_on_exactly(tmp_path: Path) -> None:
    def steps(net: Net, model: Any, optimizer: Any, fabric: Fabric, first: int, last: int) -> None:
        samples = Samples()
        for i in range(first, last):
            batch = [t[(8 * i + fabric.global_rank) % 56 :][:8] for t in (samples.inputs, samples.targets)]
            optimizer.zero_grad()
            fabric.backward(model.training_step(batch, i))
            optimizer.step()

    def whole(rank: int) -> None:
        seed_everything(7, verbose=False)
        fabric = launch("elastic_entropy", 2)
        net, model, optimizer = train(fabric, 0)
        steps(net, model, optimizer, fabric, 0, 30)
        fabric.save(tmp_path / "at.ckpt", {"model": model, "optimizer": optimizer, "step": 30})
        steps(net, model, optimizer, fabric, 30, 60)
        fabric.save(tmp_path / "whole.ckpt", {"model": model, "optimizer": optimizer, "step": 60})

    def again(rank: int) -> None:
        seed_everything(8, verbose=False)
        fabric = launch("elastic_entropy", 2)
        net, model, optimizer = train(fabric, 1)
        state = {"model": model, "optimizer": optimizer, "step": 0}
        fabric.load(tmp_path / "at.ckpt", state)
        assert state["step"] == 30
        steps(net, model, optimizer, fabric, 30, 60)
        fabric.save(tmp_path / "again.ckpt", {"model": model, "optimizer": optimizer, "step": 60})

    assert external(2, whole) == ["", ""]
    assert external(2, again) == ["", ""]
    files = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "again")]
    assert all(torch.equal(v, files[1]["model"][k]) for k, v in files[0]["model"].items())
    for r in range(2):
        own = [torch.load(tmp_path / f"{n}.ckpt.replicas/{r}.pt", weights_only=True) for n in ("whole", "again")]
        for name, slot in own[0]["loops"][0]["slots"].items():
            assert torch.equal(slot["inner"], own[1]["loops"][0]["slots"][name]["inner"])


def test_random_numbers_differ_between_replicas_and_agree_inside(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        seed_everything(7, verbose=False)
        fabric = launch(ElasticEntropyFabricStrategy(PARLE, replicas=2), 4)
        torch.save(torch.rand(3), tmp_path / f"{rank}.pt")
        fabric.barrier()  # rank 0 has the store, which the others need until they have met

    assert external(4, work) == [""] * 4
    draws = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], draws[3])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("share", ["all", "shard"])
def test_what_replicas_see(tmp_path: Path, share: Any) -> None:
    def work(rank: int) -> None:
        seed_everything(7, verbose=False)
        fabric = launch(ElasticEntropyFabricStrategy(PARLE, data=share), 2)
        loader: Any = fabric.setup_dataloaders(DataLoader(range(16), 4, shuffle=True))  # type: ignore[arg-type]
        torch.save(torch.cat(list(loader)), tmp_path / f"{rank}.pt")
        fabric.barrier()

    assert external(2, work) == ["", ""]
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True).tolist() for rank in range(2)]
    if share == "all":
        assert sorted(seen[0]) == sorted(seen[1]) == list(range(16))
        assert seen[0] != seen[1]
    else:
        assert sorted(seen[0] + seen[1]) == list(range(16))


def test_replicas_divide_the_processes() -> None:
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"replicas must divide the number of processes \(3\), got 2"):
            launch(ElasticEntropyFabricStrategy(PARLE, replicas=2), 3)
        torch.distributed.barrier()

    assert external(3, work) == [""] * 3


@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_can_be_accumulated(replicas: int) -> None:
    """Also where a replica is one process, which has no synchronization to skip."""

    def work(rank: int) -> None:
        fabric = launch(ElasticEntropyFabricStrategy(PARLE, replicas=replicas), 2)
        _, model, _ = train(fabric, 0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with fabric.no_backward_sync(model):
                fabric.backward(model.training_step(data(8), 0))
        warned = any("does not support skipping" in str(w.message) for w in said)
        assert warned == (replicas == 2 and rank == 0)
        fabric.barrier()

    assert external(2, work) == ["", ""]


def test_ranks_that_torchrun_has_restarted_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Fabric itself opens the process group."""
    calls = []

    class Joined(Exception):
        pass

    def join(environment: Any, backend: str, device: torch.device, timeout: timedelta | None) -> None:
        calls.append((environment, backend, device, timeout))
        raise Joined

    monkeypatch.setattr(fabric_strategy, "join_after_restart", join)
    own = ElasticEntropyFabricStrategy(
        parallel_devices=[torch.device("cpu")],
        cluster_environment=LightningEnvironment(),
        timeout=timedelta(seconds=9),
    )
    with pytest.raises(Joined):
        own.setup_environment()
    assert calls == [(own.cluster_environment, "gloo", torch.device("cpu"), timedelta(seconds=9))]
