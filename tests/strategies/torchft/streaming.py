"""Replicas that stream and come and go: ``python -m tests.strategies.torchft.streaming SCENARIO``.

As in ``meetings``, a scenario's replicas are threads of one process with real servers and process groups, or processes
where one has to die. What they train is a small net, on data that a replica's number and the step decide.
"""

import json
import os
import sys
import threading
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.strategies.options import Grid
from lightning_entropy.strategies.replica import ReplicaLoops
from tests.strategies.torchft.meetings import lighthouse, meeting, side_by_side, three_processes

# Exchanges begin after steps 1 and 4 of a loop, and are used after steps 3 and 6.
METHOD = le.streaming_diloco(6, 2, 2, 0.5, outer_lr=0.7, outer_momentum=0.5)
STEPS = 26  # so that an exchange is on its way at the end


def batch(replica: int, step: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1000 * replica + step))


class Training:
    """One replica's.

    Args:
        replica: its number.
        assembly: where it meets others; None: they are ranks of torch.distributed.
        format: of what is sent.
        replicas: how many there are, of ranks.
    """

    def __init__(self, replica: int, assembly: Any = None, format: Any = "float32", replicas: int = 1) -> None:
        torch.manual_seed(0)
        self.replica, self.assembly, self.steps, self.lost = replica, assembly, 0, 0
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)
        self.anchors: dict[int, list[list[float]]] = {}  # x after every step
        self.loops = ReplicaLoops(
            self.net,
            [self.optimizer],
            METHOD,
            Grid(replica, replicas, replicas) if assembly is None else Grid(0, 1, 1, replica),
            outer=None,
            seed=0,
            communication_dtype=format,
            overlap=True,
            apart=False,
            timeout=None,
            meeting=lambda where: nullcontext(),
            assembly=assembly,
        )

    def step(self, *, tells: bool | None = None) -> None:
        """Train a step, and give the state to a replica that waits for it.

        Args:
            tells: what is on its way, which has arrived; or not; None: what there happens to be.
        """
        self.loops.begin()
        self.optimizer.zero_grad()
        x = batch(self.replica, self.steps)
        (self.net(x) - x[:, :2].sin()).square().mean().backward()
        self.optimizer.step()
        rounds = [coupling.round for coupling in self.loops.couplings]
        self.loops.count(self.optimizer)
        for before, coupling in zip(rounds, self.loops.couplings, strict=True):
            self.lost += self.assembly is not None and before not in (None, coupling.round) and before.means is None
        self.steps += 1
        self.anchors[self.steps] = self.x()
        for coupling in self.loops.couplings if tells is not None else []:
            if coupling.round is not None:
                coupling.round._encounter.over.wait(10)
        if self.assembly is not None and self.assembly.asks():
            if tells in (None, True):
                self.loops.receive()
            position = ReplicaLoops.position(self.loops.state_dict())
            self.assembly.give_state({"x": self.x(), "position": position, "steps": self.steps})

    def x(self) -> list[list[float]]:
        return [x.flatten().tolist() for x in self.loops.loops.loops[0].anchor]

    def y(self) -> list[list[float]]:
        return [p.detach().flatten().tolist() for p in self.net.parameters()]

    def take(self, state: dict[str, Any]) -> None:
        """Begin where another replica is."""
        with torch.no_grad():
            for p, x in zip(self.net.parameters(), state["x"], strict=True):
                p.copy_(torch.tensor(x).view_as(p))
        self.loops.load_state_dict(state["position"])
        self.steps = state["steps"]


def together(format: Any) -> Any:
    """Three replicas that are always there; x and y at the end."""
    with lighthouse(min_replicas=3) as address:
        three = [Training(r, meeting(r, address, 3), format) for r in range(3)]
        side_by_side([lambda t=t: [t.step() for _ in range(STEPS)] for t in three])
        for t in three:
            t.assembly.close()
        return [(t.x(), t.y()) for t in three]


def exact() -> Any:
    return together("float32")


def rounded() -> Any:
    return together("int4")


def joined(*, tells: bool) -> Any:
    """Two replicas, and a third that comes when they have taken seven steps; x of all from its first step on."""
    with lighthouse(min_replicas=2) as address:
        here = threading.Event()
        three = [Training(r, meeting(r, address, 2)) for r in range(3)]

        def train(t: Training) -> None:
            while t.steps < 5 * METHOD.inner_steps:
                if t.steps == 7:  # of the first fragment's second loop: its exchange has begun
                    here.wait()
                    time.sleep(1.0)  # the lighthouse has heard of the third
                t.step(tells=tells)

        def come(t: Training) -> None:
            while three[0].steps < 7:
                time.sleep(0.01)
            encounter = t.assembly.join()
            here.set()
            t.take(t.assembly.take_state(encounter.wait()))
            t.anchors[t.steps] = t.x()
            train(t)

        side_by_side([lambda: train(three[0]), lambda: train(three[1]), lambda: come(three[2])])
        versions = [[c.version for c in t.loops.couplings] for t in three]
        for t in three:
            t.assembly.close()
        return {"anchors": [t.anchors for t in three], "versions": versions}


def join() -> Any:
    return joined(tells=True)


def join_untold() -> Any:
    return joined(tells=False)


def out_of_step() -> Any:
    """The first of three comes to the second exchange when the others come to the first, of which one has missed some.

    All send their number plus one, and ten times as much in the second exchange.
    """
    from lightning_entropy.strategies.torchft.exchange import ElasticCoupling

    with lighthouse(min_replicas=3) as address:
        taken: list[Any] = [None] * 3
        places = [meeting(r, address, 3) for r in range(3)]
        streams = [
            [
                ElasticCoupling(
                    places[r],
                    stream,
                    common=lambda r=r, stream=stream: {"x": [r, stream]},
                    catch_up=lambda common, r=r: taken.__setitem__(r, common["x"]),
                )
                for stream in range(2)
            ]
            for r in range(3)
        ]
        for first, second in streams:
            first.version, second.version = 7, 7
        streams[2][0].version = 5

        def play(r: int, stream: int) -> Any:
            means = streams[r][stream]([torch.full((2,), (r + 1.0) * 10**stream)])()
            return None if means is None else means[0].tolist()

        means = side_by_side([lambda r=r: [play(r, s) for s in ((1, 0), (0, 1, 0), (0, 1, 0))[r]] for r in range(3)])
        # One that has another number of exchanges is told.
        for place in places:
            place._in_step = place is not places[0]
        lone = ElasticCoupling(places[0], 5)
        said: list[str] = []

        def tried() -> None:
            try:
                lone([torch.ones(2)])()
            except ValueError as error:
                said.append(str(error))

        side_by_side([tried, *(lambda r=r: [play(r, i % 2) for i in range(21)] for r in (1, 2))])
        for place in places:
            place.close()
        return {"means": means, "taken": taken, "said": said}


def member(replica: int, address: str) -> Any:
    """One of three replicas in a process of its own; the last one dies in an exchange, which it has begun."""
    t = Training(replica, meeting(replica, address, 3))
    while t.steps < 6 * METHOD.inner_steps:
        if t.steps == 3:  # all three have met
            t.assembly.peers._min_replicas = 2
        if t.steps == 9 and replica == 2:  # it is to begin after the next step, to be used two steps later
            t.assembly.peers.sum = lambda *_, **__: os.kill(os.getpid(), 9)
        t.step()
        time.sleep(0.05)
    t.assembly.close()
    return {"x": t.x(), "lost": t.lost, "present": t.assembly.present}


def killed() -> Any:
    """Three processes, of which one is killed."""
    return three_processes(member, min_replicas=2)


SCENARIOS = ("killed", "exact", "rounded", "join", "join_untold", "out_of_step")

if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}), flush=True)
