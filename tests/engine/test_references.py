"""The engine against the literal references: same mini-batches, same noise, float64, 200 inner steps, 1e-12."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.noise import NoiseStreams
from tests import reference
from tests.engine.methods_table import perturbs
from tests.reference import Params

STEPS = 200
DTYPE = torch.float64


def mlp(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(DTYPE)


def batches(n: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 5, generator=g, dtype=DTYPE), torch.randint(3, (8,), generator=g)) for _ in range(n)]


def loss_of(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def grad(params: Params, batch: Any) -> Params:
    """Of the loss of ``mlp`` with these weights."""
    leaves = [p.clone().requires_grad_() for p in params]
    inner, inner_bias, outer, outer_bias = leaves
    hidden = torch.tanh(torch.nn.functional.linear(batch[0], inner, inner_bias))
    out = torch.nn.functional.linear(hidden, outer, outer_bias)
    return list(torch.autograd.grad(torch.nn.functional.cross_entropy(out, batch[1]), leaves))


def start(seed: int = 0) -> Params:
    return [p.detach().clone() for p in mlp(seed).parameters()]


def train(
    relaxation: le.Relaxation,
    make: Callable[..., torch.optim.Optimizer],
    data: list[Any],
    *,
    outer: Any = None,
    decay: float = 0.0,
    closure: bool = True,
) -> tuple[list[Params], le.InnerOuter]:
    """Run the engine on the batches and return the anchor after every outer step."""
    model = mlp()
    optimizer = make(model.parameters())
    loop = le.relax(optimizer, relaxation, outer=outer, seed=7)
    if perturbs(relaxation):
        loop.prepare()
    anchors, t = [], 0
    for batch in data:

        def evaluate(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            if decay:
                loss = loss + decay / 2 * sum((p**2).sum() for p in model.parameters())
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        if loop.outer_step > t:
            t = loop.outer_step
            anchors.append([x.clone() for x in loop.anchor])
    return anchors, loop


def draws(loop_steps: int, seed: int = 7, purpose: str = "") -> Callable[[int, int], Params]:
    """The engine's own draws, by (outer, inner) step."""
    params = list(mlp().parameters())
    streams = NoiseStreams(seed, purpose)

    def gaussian(outer_step: int, inner_step: int) -> Params:
        seeds = streams.seeds(params, params, outer_step * loop_steps + inner_step)
        zeros = [torch.zeros_like(p) for p in params]
        noise = [torch.zeros_like(p) for p in params]
        off, on = [0.0] * len(zeros), [1.0] * len(zeros)
        F.inner_move_(F.Move(noise, zeros, None, stiffness=off, noise=on, average=1.0, seeds=seeds))
        return noise

    return gaussian


def assert_same(ours: list[Params], theirs: list[Params], tolerance: float = 1e-12) -> None:
    assert len(ours) == len(theirs) > 0
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


sgd = functools.partial(torch.optim.SGD, lr=0.1)
nesterov = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_entropy_sgd_of_the_paper(reset: bool, closure: bool) -> None:
    scoping = le.Scoping(0.03, 0.05)
    data = batches(STEPS)
    ours, _ = train(
        le.entropy_sgd(20, scoping, 1e-2, 0.75, coupled=True, reset_momentum=reset, outer_lr=0.7),
        functools.partial(nesterov, weight_decay=1e-3),
        data,
        closure=closure,
    )
    theirs = reference.entropy_sgd(
        start(), grad, batches=data, outer_steps=10, inner_steps=20, inner_lr=0.1, outer_lr=0.7,
        gamma=reference.scoping(0.03, 0.05), noise=1e-2, gaussian=draws(20), average=0.75, momentum=0.9,
        reset_momentum=reset, weight_decay=1e-3,
    )  # fmt: skip
    assert_same(ours, theirs.anchors)


def test_entropy_sgd_with_momentum_in_both_loops() -> None:
    data = batches(STEPS)
    ours, _ = train(le.entropy_sgd(20, 0.5, 0.0, 0.75, coupled=True, outer_lr=0.5, outer_momentum=0.9), nesterov, data)
    theirs = reference.entropy_sgd(
        start(), grad, batches=data, outer_steps=10, inner_steps=20, inner_lr=0.1, outer_lr=0.5, gamma=0.5,
        average=0.75, momentum=0.9, reset_momentum=False, outer_momentum=0.9,
    )  # fmt: skip
    assert_same(ours, theirs.anchors)


def test_the_released_pytorch_optimizer() -> None:
    decay, inner = 1e-3, 20
    data = batches(10 * (inner + 1))
    used = [b for i, b in enumerate(data) if i % (inner + 1)]  # the released code discards the first of L + 1
    ours, _ = train(
        le.Relaxation(
            inner_steps=inner, gamma=0.3, noise=2**0.5 * 1e-2, average=0.25, explicit=True, reset_momentum=True
        ),
        nesterov,
        used,
        decay=decay,
        outer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay),
    )
    theirs = reference.entropy_sgd_released(
        start(), grad, batches=data, outer_steps=10, inner_steps=inner, gamma=0.3, noise=1e-2,
        gaussian=draws(inner), weight_decay=decay,
    )  # fmt: skip
    assert_same(ours, theirs.anchors)


def test_the_released_lua_optimizer() -> None:
    inner = 20
    data = batches(10 * (inner + 1))
    used = [b for i, b in enumerate(data) if i % (inner + 1)]
    ours, _ = train(
        le.Relaxation(
            inner_steps=inner,
            gamma=le.Scoping(0.03 * 1.05, 0.05),  # t starts at 1
            noise=2**0.5 * 1e-2,
            average=0.25,
            explicit=True,
            reset_momentum=True,
            outer_lr=0.2,
        ),
        nesterov,
        used,
    )
    theirs = reference.entropy_sgd_released(
        start(), grad, batches=data, outer_steps=10, inner_steps=inner, outer_lr=0.2, noise=1e-2,
        gamma=reference.scoping(0.03, 0.05), gaussian=draws(inner), lua=True,
    )  # fmt: skip
    assert_same(ours, theirs.anchors)


def test_hamilton_jacobi_is_the_damped_fixed_point() -> None:
    """p <- (1 - d) p + d grad f(x - t p) is the coupled loop with SGD(lr = d t)."""
    t, damping, inner = 0.4, 0.25, 20
    data = batches(STEPS)
    ours, _ = train(
        le.hamilton_jacobi(inner, 1 / t, coupled=True), functools.partial(torch.optim.SGD, lr=damping * t), data
    )
    x, anchors = start(), []
    for outer_step in range(10):
        p = [torch.zeros_like(v) for v in x]
        for batch in data[outer_step * inner : (outer_step + 1) * inner]:
            g = grad([v - t * q for v, q in zip(x, p, strict=True)], batch)
            p = [(1 - damping) * q + damping * h for q, h in zip(p, g, strict=True)]
        x = [v - t * q for v, q in zip(x, p, strict=True)]
        anchors.append(x)
    assert_same(ours, anchors)


def test_hamilton_jacobi_of_the_research_code() -> None:
    """Its p starts at grad f(x): one full step lr = t before the L damped ones, so the inner lr is scheduled."""
    t, inner = 0.4, 19
    data = batches(10 * (inner + 1))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=t)
    loop = le.relax(optimizer, le.hamilton_jacobi(inner + 1, 1 / t, coupled=True, outer_lr=0.5))
    ours = []
    for i, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = t if i % (inner + 1) == 0 else 0.25 * t
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        if loop.inner_step == 0:
            ours.append([x.clone() for x in loop.anchor])
    theirs = reference.hamilton_jacobi_fixed_point(
        start(), grad, batches=data, outer_steps=10, inner_steps=inner, outer_lr=0.5 * t, gamma=1 / t, damping=0.25
    )
    assert_same(ours, theirs.anchors)


def test_lookahead() -> None:
    data = batches(STEPS)
    ours, _ = train(le.lookahead(5, 0.5), functools.partial(torch.optim.AdamW, lr=1e-2), data)
    theirs = reference.lookahead(
        start(), grad, batches=data, outer_steps=40, inner_steps=5, optimizer=reference.AdamW(1e-2), alpha=0.5
    )
    assert_same(ours, theirs.anchors)


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_two_timescale(noise: float) -> None:
    data = batches(STEPS)
    ours, _ = train(le.two_timescale(0.5, noise, 0.1), nesterov, data)
    theirs = reference.two_timescale(
        start(), grad, batches=data, steps=STEPS, optimizer=reference.SGD(0.1, 0.9, True), gamma=0.5, slow_lr=0.1,
        noise=noise, gaussian=draws(1),
    )  # fmt: skip
    assert_same(ours, theirs.anchors)


@pytest.mark.parametrize(
    ("relaxation", "numbers"), [(le.diloco(20), (0.7, 0.9)), (le.snoo(20), (0.7, 0.6)), (le.snoo(20, 0.5), (0.5, 0.6))]
)
def test_snoo_is_diloco_on_one_replica(relaxation: le.Relaxation, numbers: tuple[float, float]) -> None:
    data = batches(STEPS)
    ours, _ = train(relaxation, functools.partial(torch.optim.AdamW, lr=1e-2), data)
    theirs = reference.diloco(
        start(), grad, batches=[data], outer_steps=10, inner_steps=20, optimizer=reference.AdamW(1e-2),
        outer_lr=numbers[0], outer_momentum=numbers[1],
    )  # fmt: skip
    assert_same(ours, theirs[0].anchors)


@pytest.mark.parametrize("m", [0.0, 0.9, 0.9967])
def test_primal_averaging_is_diloco_at_every_step(m: float) -> None:
    """Ours with the user's lr, and in general: diloco(1, eta, m) is GPA with the step eta lr / (1 - m)."""
    data = batches(STEPS)
    for relaxation, lr in ((le.gpa(m), 1e-2), (le.diloco(1, 0.3, m), 0.3 * 1e-2 / (1 - m))):
        ours, _ = train(relaxation, functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), data)
        theirs = reference.gpa_adamw(
            start(), grad, batches=data, steps=STEPS, lr=lr, train_averaging=m, averaging=m, weight_decay=0.1
        )
        assert_same(ours, theirs.anchors)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("scale", ["absolute", "filter", "relative"])
def test_heat(scale: Any, closure: bool) -> None:
    data = batches(STEPS)
    relaxation = le.heat(4, width=0.1, scale="relative") if scale == "relative" else le.heat(4, 1e3, scale=scale)
    ours, _ = train(relaxation, functools.partial(nesterov, weight_decay=1e-3), data, closure=closure)
    theirs = reference.heat(
        start(), grad, batches=data, outer_steps=50, inner_steps=4, gamma=100.0 if scale == "relative" else 1e3,
        gaussian=draws(4), optimizer=reference.SGD(0.1, 0.9, True, 1e-3), filter_normalized=scale == "filter",
        relative=scale == "relative",
    )  # fmt: skip
    assert len(ours) == 50
    assert_same(ours, theirs.anchors)


class Replicas:
    """n loops in one process, each in a thread; ``mean`` is their meeting point."""

    def __init__(self, n: int) -> None:
        self.n, self.barrier, self.given = n, threading.Barrier(n), [None] * n

    def mean(self, rank: int, deferred: bool) -> Callable[[list[Tensor]], Any]:
        def meet(tensors: list[Tensor]) -> list[Tensor]:
            self.given[rank] = tensors
            self.barrier.wait()
            result = [sum(parts) / self.n for parts in zip(*self.given, strict=True)]
            self.barrier.wait()
            return result

        def replica_mean(tensors: list[Tensor]) -> Any:
            return (lambda: meet(tensors)) if deferred else meet(tensors)

        return replica_mean

    def train(self, relaxation: le.Relaxation, make: Any, data: list[list[Any]], deferred: bool) -> list[list[Params]]:
        models = [mlp() for _ in range(self.n)]  # built here: the global RNG belongs to one thread
        results: list[Any] = [None] * self.n

        def run(rank: int) -> None:
            optimizer = make(models[rank].parameters())
            loop = le.relax(optimizer, relaxation, replica_mean=self.mean(rank, deferred), seed=rank)
            if perturbs(relaxation):
                loop.prepare()
            anchors = []
            for batch in data[rank]:
                optimizer.zero_grad()
                loss_of(models[rank], batch).backward()
                optimizer.step()
                if loop.inner_step == 0:
                    anchors.append([x.clone() for x in loop.anchor])
            results[rank] = anchors

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(r is not None for r in results), "a replica failed"
        return results


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_parle(form: Any, deferred: bool) -> None:
    n, data = 3, [batches(STEPS, seed=10 + a) for a in range(3)]
    ours = Replicas(n).train(
        le.parle(
            20, le.Scoping(0.01, 0.1, limit=1.0), le.Scoping(0.1, 0.1, limit=1.0), 0.25, coupled=True,
            elastic_target="anchor" if form == "paper" else "average", outer_lr=0.1, outer_momentum=0.9,
        ),
        functools.partial(nesterov, weight_decay=5e-4), data, deferred,
    )  # fmt: skip
    theirs = reference.parle(
        [start() for _ in range(n)], grad, batches=data, outer_steps=10, inner_steps=20, inner_lr=0.1, outer_lr=0.1,
        gamma=reference.scoping(0.01, 0.1, 1.0), rho=reference.scoping(0.1, 0.1, 1.0), form=form,
        weight_decay=5e-4, start=0,
    )  # fmt: skip
    for left, right in zip(ours, theirs, strict=True):
        assert_same(left, right.anchors)


def test_elastic_sgd() -> None:
    n, data = 3, [batches(STEPS, seed=10 + a) for a in range(3)]
    ours = Replicas(n).train(le.elastic_sgd(10, 0.3), nesterov, data, True)
    theirs = reference.elastic_sgd(
        [start() for _ in range(n)], grad, batches=data, outer_steps=20, inner_steps=10, rho=0.3,
        optimizer=reference.SGD(0.1, 0.9, True),
    )  # fmt: skip
    for left, right in zip(ours, theirs, strict=True):
        assert_same(left, right.anchors)


@pytest.mark.parametrize("method", ["local_sgd", "diloco"])
def test_replicas_along_the_mean_pseudo_gradient(method: str) -> None:
    n, data = 3, [batches(STEPS, seed=10 + a) for a in range(3)]
    make = functools.partial(torch.optim.AdamW, lr=1e-2)
    ours = Replicas(n).train(getattr(le, method)(20), make, data, False)
    theirs = getattr(reference, method)(
        start(), grad, batches=data, outer_steps=10, inner_steps=20, optimizer=reference.AdamW(1e-2)
    )
    for left, right in zip(ours, theirs, strict=True):
        assert_same(left, right.anchors)
    for other in ours[1:]:
        assert_same(ours[0], other, tolerance=0)


def test_diloco_with_a_spring_to_the_last_global_x() -> None:
    data = [batches(STEPS, seed=10 + a) for a in range(3)]
    make = functools.partial(torch.optim.AdamW, lr=1e-2)
    ours = Replicas(3).train(le.palsgd(20, 2.0), make, data, False)
    theirs = reference.diloco(
        start(), grad, batches=data, outer_steps=10, inner_steps=20, optimizer=reference.AdamW(1e-2), stiffness=0.02
    )
    for left, right in zip(ours, theirs, strict=True):
        assert_same(left, right.anchors)


adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
FRAGMENTS = {1: [[0, 1, 2, 3]], 2: [[0], [1, 2, 3]], 3: [[0], [1, 2], [3]]}  # of mlp: 35, 7, 21 and 3 weights


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    ("fragments", "delay", "mixing"),
    [
        (1, 0, 0.5), (1, 3, 0.0), (1, 19, 0.5), (2, 0, 0.0), (2, 0, 0.5), (2, 1, 0.5), (2, 9, 0.0), (2, 10, 0.5),
        (2, 19, 1.0), (3, 0, 0.3), (3, 2, 0.0), (3, 11, 0.5),
    ],
)  # fmt: skip
def test_streaming_diloco(fragments: int, delay: int, mixing: float, deferred: bool) -> None:
    """Also with delays above the spacing of the turns, and fragments that do not divide the loop."""
    data = [batches(STEPS, seed=10 + a) for a in range(2)]
    ours = Replicas(2).train(le.streaming_diloco(20, fragments, delay, mixing), adamw, data, deferred)
    theirs = reference.streaming_diloco(
        start(), grad, batches=data, steps=STEPS, inner_steps=20, fragments=FRAGMENTS[fragments], delay=delay,
        mixing=mixing, optimizer=reference.AdamW(1e-2),
    )  # fmt: skip
    for left, right in zip(ours, theirs, strict=True):
        assert_same(left, right.anchors[19::20])
    assert_same(ours[0], ours[1], tolerance=0)


# A chain on the smoothed loss: every gradient at perturbed weights, inside spring, noise, average and outer step

Case = tuple[dict[str, Any], Any, Any]
SGD, ADAMW = (nesterov, reference.SGD(0.1, 0.9, True)), (adamw, reference.AdamW(1e-2))
SMOOTHED: dict[str, Case] = {
    "sgd": ({"gamma": 0.5}, *SGD),
    "adamw": ({"gamma": 0.5}, *ADAMW),
    "filter": ({"gamma": 0.5, "scale": "filter"}, *SGD),
    "filter_adamw": ({"gamma": 0.5, "scale": "filter"}, *ADAMW),
    "langevin": ({"gamma": 0.5, "noise": 1e-2}, *SGD),
    "langevin_adamw": ({"gamma": 0.5, "noise": 1e-2, "scale": "filter"}, *ADAMW),
    "average": ({"gamma": 0.5, "average": 0.25}, *SGD),
    "relative": ({"gamma": 0.5, "scale": "relative"}, *SGD),
    "lookahead": ({"outer_lr": 0.3, "scale": "relative"}, *ADAMW),
    "outer_lr": ({"gamma": 0.5, "outer_lr": 0.3}, *ADAMW),
    "outer_momentum": ({"gamma": 0.5, "outer_lr": 0.3, "outer_momentum": 0.9}, *SGD),
    "all": (
        {
            "gamma": le.Scoping(0.03, 0.05), "noise": 1e-2, "average": 0.75, "outer_lr": 0.3, "outer_momentum": 0.5,
            "scale": "filter",
        },
        functools.partial(nesterov, weight_decay=1e-3), reference.SGD(0.1, 0.9, True, 1e-3),
    ),
}  # fmt: skip


def smoothed(
    options: dict[str, Any], starts: list[Params], data: list[list[Any]], seeds: list[int], **more: Any
) -> Any:
    """The reference, with what the relaxation calls otherwise called as there."""
    arguments = dict(options)
    scale = arguments.pop("scale", "absolute")
    arguments |= {"filter_normalized": scale == "filter", "relative": scale == "relative"}
    if "elastic_target" in arguments:
        arguments["target"] = arguments.pop("elastic_target")
    return reference.smoothed_chain(
        starts, grad, batches=data, outer_steps=10, inner_steps=20, gaussians=[draws(20, s) for s in seeds],
        perturbations=[draws(20, s, "perturbation") for s in seeds], **arguments, **more,
    )  # fmt: skip


WIDTH = le.Scoping(0.05, 0.1)


@functools.cache
def smoothed_chain(case: str) -> list[Params]:
    options, _, optimizer = SMOOTHED[case]
    return smoothed(options, [start()], [batches(STEPS)], [7], width=WIDTH, optimizer=optimizer)[0].anchors


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("case", SMOOTHED)
def test_a_chain_on_the_smoothed_loss(case: str, closure: bool) -> None:
    options, make, _ = SMOOTHED[case]
    relaxation = le.Relaxation(inner_steps=20, width=WIDTH, **options)
    ours, _ = train(relaxation, make, batches(STEPS), closure=closure)
    assert_same(ours, smoothed_chain(case))


def test_a_lookahead_through_the_smoothed_loss() -> None:
    ours, _ = train(le.smoothed_lookahead(outer_lr=0.3, width=WIDTH), adamw, batches(STEPS))
    assert_same(ours, smoothed_chain("lookahead"))


SMOOTHED_REPLICAS: dict[str, dict[str, Any]] = {
    "anchor": {"gamma": 0.5, "noise": 1e-2, "average": 0.25, "rho": 0.3, "outer_lr": 0.3, "outer_momentum": 0.5},
    "average": {"gamma": 0.5, "average": 0.25, "rho": 0.3, "elastic_target": "average", "scale": "filter"},
    "pseudo_gradient": {"gamma": 0.5, "elastic_target": "pseudo_gradient", "outer_lr": 0.7, "outer_momentum": 0.9},
}


@functools.cache
def smoothed_replicas(target: str) -> list[list[Params]]:
    data = [batches(STEPS, seed=10 + a) for a in range(2)]
    optimizer = reference.SGD(0.1, 0.9, True)
    paths = smoothed(SMOOTHED_REPLICAS[target], [start(), start()], data, [0, 1], width=0.05, optimizer=optimizer)
    return [path.anchors for path in paths]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("target", SMOOTHED_REPLICAS)
def test_replicas_on_the_smoothed_loss(target: str, deferred: bool) -> None:
    data = [batches(STEPS, seed=10 + a) for a in range(2)]
    relaxation = le.Relaxation(inner_steps=20, width=0.05, **SMOOTHED_REPLICAS[target])
    ours = Replicas(2).train(relaxation, nesterov, data, deferred)
    for left, right in zip(ours, smoothed_replicas(target), strict=True):
        assert_same(left, right)
