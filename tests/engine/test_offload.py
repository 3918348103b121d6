"""x and the outer optimizer in the host's memory: the same numbers, and nothing of them on the device between steps.

No GPU is needed: fake tensors on a device "cuda" refuse to be mixed with those of the host, or to tell it a value.
"""

import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lightning_entropy as le
from lightning_entropy.engine.outer_rules import ReplicaMean
from tests.device_calls import Calls, as_on_a_gpu
from tests.engine.training import Net, assert_equal, start, step, through_a_file, two_replicas, values

sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam = functools.partial(torch.optim.Adam, lr=0.05)
pytestmark = pytest.mark.filterwarnings("ignore:offload_anchor=True gains nothing")

# A method, its outer optimizer, and the replicas' mean.
CASES: dict[str, tuple[le.Relaxation, Any, Callable[[list[Tensor]], Any] | None]] = {
    "lookahead": (le.lookahead(3), None, None),
    "kicked": (le.Relaxation(inner_steps=3, noise=0.1, outer_lr=0.5), None, None),
    "smoothed": (le.Relaxation(inner_steps=3, outer_lr=0.5, width=0.1), None, None),
    "snoo": (le.snoo(3), None, None),
    "two time scales": (le.Relaxation(inner_steps=2, reset=False, outer_lr=0.5), None, None),
    "outer adam": (le.lookahead(3), adam, None),
    "local_sgd": (le.local_sgd(3), None, two_replicas),
    "diloco": (le.diloco(3), None, two_replicas),
    "streaming_diloco": (le.streaming_diloco(3, 2, 1), None, two_replicas),
    "streaming adam": (le.streaming_diloco(3, 2, 1), adam, two_replicas),
    "elastic_sgd": (le.elastic_sgd(3, 0.5), None, two_replicas),
    "elastic average": (le.Relaxation(inner_steps=3, rho=0.5, elastic_target="average"), None, two_replicas),
}
STEPS = 10


def begin(name: str, offload: bool, dtype: torch.dtype = torch.float64) -> Any:
    relaxation, outer, mean = CASES[name]
    return start(sgd, relaxation, dtype=dtype, outer=outer, replica_mean=mean, offload_anchor=offload)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_the_same_bits(name: str, dtype: torch.dtype) -> None:
    seen = []
    for offload in (False, True):
        net, optimizer, loop = begin(name, offload, dtype)
        loop.measure = True
        found: list[Any] = []
        for i in range(STEPS):
            step(net, optimizer, i)
            found.append(values(net.parameters()))
            if i in (2, 5, 6):
                found += [values(loop.anchor), values(loop.average), list(loop.distances or ())]
            if i == 7:
                with loop.at_anchor():
                    found.append(values(net.parameters()))
            if i == 8:
                with loop.at_anchor(), torch.no_grad():
                    net.a.mul_(2)
        loop.close()
        loop.detach()
        found.append(values(net.parameters()))
        seen.append(found)
    for a, b in zip(*seen, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("saved_by", [False, True])
@pytest.mark.parametrize("when", [4, 5, 6])
@pytest.mark.parametrize("name", CASES)
def test_states_are_interchangeable_in_the_middle_of_a_loop(name: str, when: int, saved_by: bool) -> None:
    net, optimizer, loop = begin(name, saved_by)
    for i in range(when):
        step(net, optimizer, i)
    saved = through_a_file([net.state_dict(), optimizer.state_dict(), loop.state_dict()])
    other, its, resumed = begin(name, not saved_by)
    other.load_state_dict(saved[0])
    its.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    again = resumed.state_dict()
    assert_tree(again, saved[2])
    for i in range(when, STEPS):
        step(net, optimizer, i)
        step(other, its, i)
        assert_equal(values(other.parameters()), values(net.parameters()))
    assert_tree(resumed.state_dict(), loop.state_dict())


def assert_tree(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_tree(left[key], right[key])
    elif isinstance(left, list):
        for a, b in zip(left, right, strict=True):
            assert_tree(a, b)
    else:
        assert left == right


def test_an_outer_optimizer_that_somebody_holds_is_the_same_all_along() -> None:
    made: list[torch.optim.Optimizer] = []

    def outer(xs: list[Tensor]) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(xs, lr=1.0, momentum=0.5))
        return made[-1]

    net, optimizer, _ = start(sgd, le.lookahead(1), outer=outer, offload_anchor=True)
    for i in range(4):
        before = values(net.parameters())
        step(net, optimizer, i)
        if i == 2:
            made[-1].param_groups[0]["lr"] = 0.0
    assert len(made) == 2  # one to look at, when it attaches
    assert_equal(values(net.parameters()), before)  # its rate was 0
    assert all(p.numel() == 0 for group in made[-1].param_groups for p in group["params"])


@pytest.mark.parametrize("first", [False, True])
def test_a_replica_that_was_away_takes_over_what_the_others_have_in_common(first: bool) -> None:
    found = []
    for offload in (first, not first):
        there, its, loop = begin("diloco", first)
        away, own, behind = begin("diloco", offload)
        for i in range(3):
            step(there, its, i)
        step(away, own, 0)
        behind.load_common_state(through_a_file(loop.common_state()))
        for i in range(1, 6):
            step(away, own, i)
        found.append([*values(away.parameters()), *values(behind.anchor)])
    assert_equal(*found)


@pytest.mark.parametrize("name", ["elastic_sgd", "diloco"])
def test_a_replica_that_has_diverged_starts_again_at_the_mean(name: str) -> None:
    found = []
    for offload in (False, True):
        net, optimizer, loop = begin(name, offload)
        for i in range(4):
            step(net, optimizer, i)
        loop.restart([torch.full_like(x, 0.25) for x in loop.anchor])
        for i in range(4, 8):
            step(net, optimizer, i)
        found.append([*values(net.parameters()), *values(loop.anchor)])
    assert_equal(*found)


@pytest.mark.parametrize(
    ("relaxation", "words"),
    [
        (le.entropy_sgd(3, gamma=0.5), "gamma must be 0 with offload_anchor=True, .* as a spring is, got 0.5"),
        (le.palsgd(3, le.Pull(0.5)), r"gamma must be 0 with offload_anchor=True, .* got Pull"),
        (le.parle(3, gamma=0.0), "average must be 1 with offload_anchor=True, .* as a running mean is, got 0.25"),
        (le.heat(1, 1e4), "offload_anchor must be False with perturb=True, got True"),
    ],
)
def test_a_method_that_needs_x_at_every_step_is_refused_early(relaxation: le.Relaxation, words: str) -> None:
    optimizer = sgd(Net().parameters())
    with pytest.raises(ValueError, match=words):
        le.relax(optimizer, relaxation, offload_anchor=True)
    le.relax(optimizer, relaxation)  # nothing was attached
    with pytest.raises(ValueError, match=words):
        le.InnerOuterCallback(relaxation, offload_anchor=True)
    for strategy in (le.ElasticEntropyStrategy, le.ElasticEntropyFabricStrategy):
        if not relaxation.perturb:
            with pytest.raises(ValueError, match=words):
                strategy(relaxation, offload_anchor=True)


def test_what_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="offload_anchor must be True or False, got 1"):
        le.relax(sgd(Net().parameters()), le.lookahead(), offload_anchor=1)  # type: ignore[arg-type]


def test_on_the_cpu_it_is_said_to_gain_nothing() -> None:
    with pytest.warns(UserWarning, match="offload_anchor=True gains nothing for parameters on cpu"):
        le.relax(sgd(Net().parameters()), le.lookahead(), offload_anchor=True)


# On a GPU


@pytest.fixture
def waited() -> Iterator[list[Any]]:
    """Devices that are waited for."""
    devices: list[Any] = []
    with as_on_a_gpu(), patch.object(torch.cuda, "synchronize", devices.append), FakeTensorMode():
        yield devices


@pytest.fixture
def frozen(waited: list[Any]) -> Iterator[None]:
    """What is there already need not be looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SIZE = 4 * 1000  # of each weight, in bytes


def on_cuda(name: str, dtype: torch.dtype = torch.float32, *, offload: bool = True) -> Any:
    relaxation, outer, mean = CASES[name]
    host = relaxation.rho > 0 and relaxation.outer_target.early

    def checked(tensors: list[Tensor]) -> Any:
        assert all(t.is_cpu == (host and offload) for t in tensors)
        return mean(tensors) if mean is not None else None

    given: ReplicaMean | None = None if mean is None else checked
    params = [torch.nn.Parameter(torch.ones(100, 10, device="cuda", dtype=dtype)) for _ in range(4)]
    optimizer = sgd(params, foreach=True)
    return params, optimizer, le.relax(optimizer, relaxation, outer=outer, replica_mean=given, offload_anchor=offload)


def device_bytes() -> int:
    """What all tensors that are alive have on the device."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.device.type == "cuda":
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def take_step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("name", CASES)
def test_between_outer_steps_the_device_has_the_weights_and_their_momentum_alone(name: str) -> None:
    relaxation = CASES[name][0]
    before = device_bytes()
    params, optimizer, loop = on_cuda(name)
    found = []
    for _ in range(3 * relaxation.inner_steps):
        take_step(params, optimizer)
        found.append(device_bytes() - before)
    own = 2 * 4 * SIZE
    if relaxation.streams:  # half of the weights are on their way, from one step before they are used
        assert set(found) == {own, own + 2 * SIZE}
    else:  # y is beside weights that are perturbed, but where it is x
        assert set(found) == {own, own + 4 * SIZE if loop.perturbs else own}
    assert len(list(loop.weights)) == 4


@pytest.mark.usefixtures("frozen")
def test_without_it_the_device_has_x_and_the_outer_momentum_too() -> None:
    before = device_bytes()
    params, optimizer, loop = on_cuda("diloco", offload=False)
    for _ in range(3):
        take_step(params, optimizer)
    assert device_bytes() - before == 4 * 4 * SIZE
    assert loop.outer_step == 1


class Copies(Calls):
    """Count copies between host and device, and note those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name == "copy_" and args[0].device != args[1].device:
            queued = args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False)
            where = "to the host" if args[0].is_cpu else "to the device"
            self.found[where if queued else f"{where}, waited for"] += 1
        if name == "_to_copy":
            self.found["other"] += args[0].device != torch.device((kwargs or {}).get("device") or args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_copies_of_an_outer_step(waited: list[Any], name: str, dtype: torch.dtype) -> None:
    relaxation = CASES[name][0]
    params, optimizer, _ = on_cuda(name, dtype)
    for _ in range(2 * relaxation.inner_steps):  # makes the state
        take_step(params, optimizer)
    waited.clear()
    found = []
    for _ in range(relaxation.inner_steps):
        with Copies() as copies:
            take_step(params, optimizer)
        found.append(copies.found)
    total = sum(found, Counter[str]())
    early = relaxation.rho > 0 and relaxation.outer_target.early
    assert total.keys() <= {"to the host", "to the device"} | ({"other"} if early else set())
    assert len(waited) == (1 if early else 0)  # for the host to read x, whose mean is taken
    moments = {"snoo": 1, "diloco": 1, "streaming_diloco": 1, "outer adam": 2, "streaming adam": 2}.get(name, 0)
    if relaxation.reset and not relaxation.streams and name != "smoothed":
        narrow = dtype is torch.bfloat16  # what a narrow weight has been given since is put into a wide x
        assert total["to the device"] == 4 * (1 + narrow + moments)
        assert total["to the host"] == 4 * (2 + moments)  # x once more where the next loop begins
        assert sum(map(bool, found)) == 2
    if relaxation.streams:  # x is read when an exchange begins, and moved when it is used
        assert total["to the device"] == 4 * (2 + moments)
        assert total["to the host"] == 4 * (1 + moments)


@pytest.mark.parametrize("name", CASES)
def test_whoever_looks_finds_x_on_the_device_and_a_save_waits_for_the_host(waited: list[Any], name: str) -> None:
    params, optimizer, loop = on_cuda(name)
    for _ in range(4):
        take_step(params, optimizer)
    waited.clear()
    assert all(x.is_cuda for x in loop.anchor)
    x = loop.anchor_of(params[0])
    assert x is None or x.is_cuda
    assert not waited
    state = loop.state_dict()
    assert waited == [params[0].device]
    assert all(slot["anchor"].is_cpu for slot in state["slots"].values())
    loop.show()
    assert all(p.is_cuda for p in params)
    loop.detach()
    assert waited == [params[0].device]


def test_the_hosts_memory_is_pinned_for_cuda(waited: list[Any]) -> None:
    asked: list[bool] = []

    def empty_like(*args: Any, **kwargs: Any) -> Tensor:
        if "pin_memory" in kwargs:
            asked.append(kwargs["pin_memory"])
        return original(*args, **kwargs)

    original = torch.empty_like
    with patch.object(torch, "empty_like", empty_like):
        params, optimizer, _ = on_cuda("diloco")
        for _ in range(3):
            take_step(params, optimizer)
    assert asked == [True] * 8  # x, and the momentum
