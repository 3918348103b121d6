"""A small net, plain or sharded over ranks, and what a relaxation does with it: the same numbers, whoever has them."""

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_entropy as le
from lightning_entropy.engine.shards import gradient_of, part_of, region_of, whole

STEPS = 7
NO_FSDP = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6's FSDP2 does not run on a CPU")


class Net(nn.Module):
    """Rows that do not divide by two, a layer whose columns are shared out, and a single number."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 5, dtype=dtype)
        self.middle = nn.Linear(5, 8, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.last = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x))))) * self.scale


def fsdp(net: Net) -> None:
    """Shard the middle on its own; the rest are the root's, which stay gathered after a forward pass."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net.middle, mesh=mesh)
    columns = lambda p: Shard(1) if p.shape == (5, 6) else None  # noqa: E731
    fully_shard(net, mesh=mesh, shard_placement_fn=columns)


def tensor_parallel(net: Net) -> None:
    """Share out the columns of the middle and the rows of the last."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(net, mesh, {"middle": ColwiseParallel(), "last": RowwiseParallel()})


def both(net: Net) -> None:
    """A mesh of one by two: FSDP2 on top of a tensor-parallel plan."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"middle": ColwiseParallel(), "last": RowwiseParallel()})
    fully_shard(net.middle, mesh=mesh["dp"])
    fully_shard(net, mesh=mesh["dp"])


class Scenario(NamedTuple):
    """One training."""

    relaxation: le.Relaxation
    shard: Callable[[Net], None] = fsdp
    outer: Any = None
    dtype: torch.dtype = torch.float64
    adam: bool = False
    compile: bool = False
    offload: bool = False


SCENARIOS = {
    "spring": Scenario(le.hamilton_jacobi(3, gamma=2.0)),
    "coupled": Scenario(le.entropy_sgd(3, gamma=2.0, noise=0.1, coupled=True, reset_momentum=True)),
    "explicit": Scenario(le.Relaxation(inner_steps=3, gamma=2.0, explicit=True, average=0.5)),
    "noise": Scenario(le.entropy_sgd(3, gamma=2.0, noise=0.1)),
    "pull": Scenario(le.entropy_sgd(3, gamma=le.Pull(0.5), noise=0.01)),
    "lookahead": Scenario(le.lookahead(2), adam=True),
    "nesterov": Scenario(le.diloco(3)),
    "streaming": Scenario(le.streaming_diloco(4, 2, 1)),
    "outer adam": Scenario(le.lookahead(2), outer=torch.optim.Adam),
    "two time scales": Scenario(le.two_timescale(gamma=1.0, noise=0.05)),
    "heat": Scenario(le.heat(2, width=0.1, scale="absolute")),
    "filter heat": Scenario(le.heat(2, width=0.1, scale="filter")),
    "relative heat": Scenario(le.heat(1, width=0.1, scale="relative"), adam=True),
    "compiled": Scenario(le.entropy_sgd(3, gamma=2.0, noise=0.0), compile=True),
    "offloaded": Scenario(le.diloco(3), offload=True),
    "offloaded adam": Scenario(le.streaming_diloco(4, 2, 1), outer=torch.optim.Adam, offload=True),
    "tensor parallel": Scenario(le.entropy_sgd(3, gamma=2.0, noise=0.1), tensor_parallel),
    "tensor parallel filter heat": Scenario(le.heat(2, width=0.1, scale="filter"), tensor_parallel),
    "both": Scenario(le.entropy_sgd(3, gamma=2.0, noise=0.1), both),
}


def inputs(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)


def loss_of(net: nn.Module, step: int, dtype: torch.dtype) -> Tensor:
    x, targets = inputs(step, dtype)
    return nn.functional.cross_entropy(net(x).float(), targets)


def full(t: Tensor) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def train(scenario: Scenario, *, sharded: bool, steps: int = STEPS) -> dict[str, Any]:
    """Train, look at x in the middle of a loop, save there, go on; and go on from the saved state in a new net."""
    net = Net(scenario.dtype)
    if sharded:
        scenario.shard(net)
    optimizer, loop = attach(net, scenario)
    told: dict[str, Any] = {"losses": [], "x": [], "shown": [], "distances": []}
    saved: Any = None
    loop.measure = True
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, step, scenario.dtype)
        loss.backward()
        optimizer.step()
        told["losses"].append(loss.item())
        told["distances"].append([d.item() for d in loop.distances or ()])
        told["x"].append([full(x) for x in loop.anchor])
        with loop.at_anchor(), torch.no_grad():  # which leaves copies of x in FSDP's root
            told["shown"].append(loss_of(net, 100, scenario.dtype).item())
        if step == steps - 3:
            saved = state_of(net, optimizer, loop)
    loop.detach()
    told["final"] = {name: full(p) for name, p in net.state_dict().items()}
    told["after"] = loss_of(net, 100, scenario.dtype).item()
    if saved is not None:
        told["resumed"] = resume(scenario, saved, steps, sharded=sharded)
        told["saved"] = saved
    return told


def attach(net: Net, scenario: Scenario) -> tuple[torch.optim.Optimizer, le.InnerOuter]:
    params = list(net.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(params, 0.01) if scenario.adam else torch.optim.SGD(params, 0.2, momentum=0.9)
    )
    options: dict[str, Any] = {"outer": scenario.outer, "compile": scenario.compile, "seed": 5, "module": net}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="offload_anchor=True gains nothing")
        return optimizer, le.relax(optimizer, scenario.relaxation, offload_anchor=scenario.offload, **options)


def state_of(net: Net, optimizer: torch.optim.Optimizer, loop: le.InnerOuter) -> Any:
    """Return all there is to go on from, as whole tensors."""
    with loop.at_anchor():
        weights = {name: full(p) for name, p in net.state_dict().items()}
    return {"net": weights, "optimizer": mapped(optimizer.state_dict()), "loop": mapped(loop.state_dict())}


def mapped(state: Any) -> Any:
    if isinstance(state, Tensor):
        return full(state)
    if isinstance(state, dict):
        return {k: mapped(v) for k, v in state.items()}
    return [mapped(v) for v in state] if isinstance(state, list) else state


def resume(scenario: Scenario, saved: Any, steps: int, *, sharded: bool) -> dict[str, Tensor]:
    """Go on from whole tensors in a new net, as another number of ranks would."""
    saved = copy.deepcopy(saved)  # Adam counts its steps in the tensors that it has loaded
    net = Net(scenario.dtype)
    net.load_state_dict(saved["net"])
    if sharded:
        scenario.shard(net)
    optimizer, loop = attach(net, scenario)
    state = saved["optimizer"]
    places = dict(enumerate(net.parameters()))
    optimizer.load_state_dict(
        {**state, "state": {i: {k: placed(v, places[i]) for k, v in s.items()} for i, s in state["state"].items()}}
    )
    loop.load_state_dict(saved["loop"])
    for step in range(steps - 2, steps):
        optimizer.zero_grad()
        loss_of(net, step, scenario.dtype).backward()
        optimizer.step()
    loop.detach()
    return {name: full(p) for name, p in net.state_dict().items()}


def placed(value: Any, p: Tensor) -> Any:
    return whole(part_of(value, p).clone(), p) if isinstance(value, Tensor) and value.shape == p.shape else value


def sharded_net() -> Net:
    net = Net()
    fsdp(net)
    return net


def written() -> list[str]:
    """Write a number of a weight that rank 0 has, and one of a bias that rank 1 has."""
    net = sharded_net()
    scenario = Scenario(le.lookahead(3))
    optimizer, loop = attach(net, scenario)
    loss_of(net, 0, scenario.dtype).backward()
    optimizer.step()
    with loop.at_anchor(), torch.no_grad():
        first, last = full(net.first.weight), full(net.last.bias)
        first[0, 0] += 1.0
        last[-1] += 1.0
        net.load_state_dict(
            {"first.weight": like(first, net.first.weight), "last.bias": like(last, net.last.bias)}, strict=False
        )
    return loop.weights.written


def like(value: Tensor, p: Tensor) -> Tensor:
    assert isinstance(p, DTensor)
    return distribute_tensor(value, p.device_mesh, p.placements)


def write_perturbed() -> None:
    """Write a number that rank 0 alone has, while the weights are perturbed."""
    net = sharded_net()
    _, loop = attach(net, Scenario(le.heat(1, width=0.1, scale="absolute")))
    loop.prepare()
    with torch.no_grad():
        net.scale.mul_(2)
    loop.unperturb()


def partial_parameter() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    region_of(DTensor.from_local(torch.ones(2), mesh, [Partial()]))


def summed_gradient() -> tuple[list[float], list[float]]:
    """Return the gradient of a replicated parameter that ranks have parts of a sum of, and what it is from then on."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.tensor([1.0, dist.get_rank()]), mesh, [Partial()])
    with torch.no_grad():
        gradient = gradient_of(p)
        assert gradient is not None
        return gradient.tolist(), p.grad.to_local().tolist()


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


def play(rank: int, folder: Path, names: list[str]) -> None:
    """Play scenarios in a process of a group, and write what was seen."""
    os.environ["RANK"] = str(rank)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # a linear layer's output is a view
    dist.init_process_group("gloo")
    told: dict[str, Any] = {name: train(SCENARIOS[name], sharded=True) for name in names}
    told["written"] = written()
    told["perturbed"] = error_of(write_perturbed)
    told["no module"] = error_of(lambda: le.relax(torch.optim.SGD(sharded_net().parameters(), 0.1), le.lookahead(2)))
    told["gradient"] = summed_gradient()
    told["partial"] = error_of(partial_parameter)
    torch.save(told, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
