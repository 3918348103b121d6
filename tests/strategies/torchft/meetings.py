"""Meetings of replicas, in processes of their own: ``python -m tests.strategies.torchft.meetings SCENARIO``.

A scenario is a function of a lighthouse that returns what there is to compare. Its replicas are threads of one process,
each with its servers and its process group, where none of them has to die.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tests import forked

Met = Callable[[str], tuple[Any, str]]  # results of a scenario by its name, and what was written to stderr


@contextmanager
def lighthouse(min_replicas: int = 1) -> Iterator[str]:
    from lightning_entropy.strategies.torchft.internals import open_lighthouse

    server, address = open_lighthouse(min_replicas, heartbeat_timeout=1.0, join_timeout=20.0)
    try:
        yield address
    finally:
        server.shutdown()


def meeting(replica: int, address: str, min_replicas: int = 1) -> Any:
    from lightning_entropy.strategies.torchft.assembly import Assembly

    return Assembly(replica, address, min_replicas=min_replicas, timeout=timedelta(seconds=20))


def side_by_side(functions: list[Callable[[], Any]]) -> list[Any]:
    """Return what the functions return, each in a thread."""
    results: list[Any] = [None] * len(functions)

    failed: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return results


def coupled(replica: int, address: str, **options: Any) -> Any:
    from lightning_entropy.strategies.torchft.exchange import ElasticCoupling

    return ElasticCoupling(meeting(replica, address), 0, **options)


def mean(coupling: Any, *tensors: Tensor) -> list[list[float]] | None:
    means = coupling(list(tensors))()
    return None if means is None else [m.tolist() for m in means]


def gather(couplings: list[Any]) -> None:
    """Let the replicas meet until all are there at once: who comes first meets alone."""

    def come(coupling: Any) -> None:
        while len(coupling.assembly.present) < len(couplings):
            mean(coupling, torch.zeros(3))

    side_by_side([lambda c=c: come(c) for c in couplings])


def exact() -> Any:
    """Three replicas; one has a nan, one a buffer that is not finite, and one comes to other exchanges."""
    with lighthouse() as address:
        buffers = [torch.tensor([float("inf")]), torch.tensor([2.0]), torch.tensor([6.0])]
        three = [coupled(r, address, extras=lambda r=r: [buffers[r]]) for r in range(3)]
        gather(three)
        x = [torch.tensor([1.0, 2.0, 3.0]) * (r + 1) for r in range(3)]
        whole = side_by_side([lambda r=r: mean(three[r], x[r]) for r in range(3)])
        extras = [c.last_extras[0].tolist() for c in three]
        x[1][2] = float("nan")
        nan = side_by_side([lambda r=r: mean(three[r], x[r]) for r in range(3)])
        spread = [c.spread for c in three]
        for c in three:
            c.assembly.close()
        return {"whole": whole, "extras": extras, "nan": nan, "spread": spread}


def behind() -> Any:
    """Two replicas take common steps, and one of them has missed two."""
    with lighthouse() as address:
        taken: list[Any] = [None, None]
        two = [
            coupled(
                r,
                address,
                common=lambda r=r: {"x": torch.full((2,), 10.0 + r)},
                catch_up=lambda common, r=r: taken.__setitem__(r, common["x"].tolist()),
            )
            for r in range(2)
        ]
        gather(two)
        two[0].version, two[1].version = 7, 5
        means = side_by_side([lambda r=r: mean(two[r], torch.full((2,), float(r))) for r in range(2)])
        for c in two:
            c.assembly.close()
        return {"taken": taken, "means": means, "versions": [c.version for c in two]}


def fails_alone() -> Any:
    """One of four fails in the sum; what the meeting brings, and seconds until all have heard, who wait for 20."""
    with lighthouse(min_replicas=4) as address:
        four = [coupled(r, address) for r in range(4)]
        gather(four)
        summed = four[3].assembly.peers.sum

        def fail(*_: Any, **__: Any) -> Any:
            four[3].assembly.peers.sum = summed
            raise RuntimeError("out of memory, say")

        four[3].assembly.peers.sum = fail
        start = time.monotonic()
        lost = side_by_side([lambda c=c: mean(c, torch.ones(50_000)) for c in four])
        seconds = time.monotonic() - start
        means = side_by_side([lambda r=r: mean(four[r], torch.full((2,), float(r))) for r in range(4)])
        for c in four:
            c.assembly.close()
        return {"lost": lost, "seconds": seconds, "next": means}


def panics() -> Any:
    """The meeting's thread ends with what is no Exception, as a panic of torchft's is."""

    def panic(_: Any) -> Any:
        raise KeyboardInterrupt("a panic")

    with lighthouse() as address:
        place = meeting(0, address)
        place._meet = panic
        try:
            place.exchange(torch.ones(1)).wait()
        except BaseException as error:
            return str(error)
        finally:
            place.close()


def another_model() -> Any:
    with lighthouse() as address:
        three = [coupled(r, address) for r in range(3)]
        gather(three)

        def tried(r: int) -> Any:
            try:
                return mean(three[r], torch.full((2 if r else 3,), float(r)))
            except ValueError as error:
                return str(error)

        results = side_by_side([lambda r=r: tried(r) for r in range(3)])
        for c in three:
            c.assembly.close()
        return results


def join() -> Any:
    """A replica joins another, which gives its state after the meeting, and is not counted in it."""
    with lighthouse() as address:
        first = coupled(0, address)
        alone = mean(first, torch.tensor([4.0]))
        second = meeting(1, address)
        encounter = second.join()
        time.sleep(1.0)  # the lighthouse has heard of it
        together = mean(first, torch.tensor([5.0]))
        met = encounter.wait()
        wanted = first.assembly.wants_state
        first.assembly.give_state({"x": torch.tensor([5.0]), "t": 3})
        later = first([torch.tensor([6.0])])
        time.sleep(0.5)  # the first has come to its next meeting, in which it waits for the second
        got = second.take_state(met)
        second.close()
        later = [m.tolist() for m in later()]
        first.assembly.close()
        return {
            "alone": alone,
            "together": together,
            "wanted": wanted,
            "present": met.present,
            "got": [got["x"].tolist(), got["t"]],
            "later": later,
        }


def too_few() -> Any:
    """One replica where two are needed, and then the second."""
    with lighthouse() as address:
        two = [meeting(r, address, min_replicas=2) for r in range(2)]
        first = two[0].exchange(torch.ones(1))
        time.sleep(2.0)
        waits = not first.over.is_set()
        second = two[1].exchange(torch.ones(1))
        totals = [e.wait().total.tolist() for e in (first, second)]
        for m in two:
            m.close()
        return {"waits": waits, "totals": totals}


def closed() -> Any:
    """A meeting that nobody else comes to can be closed."""
    with lighthouse(min_replicas=2) as address:
        one = meeting(0, address)
        encounter = one.exchange(torch.ones(1))
        time.sleep(0.5)
        one.close()
        encounter.over.wait(10)
        return {"over": encounter.over.is_set(), "error": type(encounter.error).__name__}


def no_lighthouse() -> Any:
    from lightning_entropy.strategies.torchft import peers

    peers.CONNECT = timedelta(seconds=1)
    with lighthouse() as address:
        pass
    try:
        meeting(0, address).join().wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def three_processes(member: Callable[[int, str], Any], min_replicas: int = 1) -> Any:
    """Run three members, of which the last is killed, forked while this process has no threads of torchft.

    Returns:
        Exit codes, and what the others have returned, by replica.
    """
    fork = multiprocessing.get_context("fork")
    address, out = fork.SimpleQueue(), fork.SimpleQueue()

    def work(replica: int) -> None:
        out.put((replica, member(replica, address.get())))

    jobs = [fork.Process(target=work, args=(r,), daemon=True) for r in range(3)]
    for job in jobs:
        job.start()
    with lighthouse(min_replicas) as at:
        for _ in jobs:
            address.put(at)
        got = dict(out.get() for _ in range(2))
        for job in jobs:
            job.join()
    return {"codes": [job.exitcode for job in jobs], "got": got}


def member(replica: int, address: str) -> list[Any]:
    """One of three replicas that send their number plus one, in a process of its own; what it got."""
    c = coupled(replica, address)
    got: list[Any] = []
    done = 0
    while done < 12:
        means = mean(c, torch.full((50_000,), float(replica + 1)))
        got.append({"mean": None if means is None else means[0][0], "present": c.assembly.present})
        done += len(c.assembly.present) == 3 or done > 0
        if replica == 2 and done == 5:  # when the others wait for what it sends
            c.assembly.peers.sum = lambda *_, **__: os.kill(os.getpid(), 9)
    c.assembly.close()
    return got


def values(replica: int, t: int) -> Tensor:
    """What a replica sends at meeting t, where it is rounded: three blocks of int8 and a bit."""
    return torch.randn(3100, generator=torch.Generator().manual_seed(10 * t + replica)) + t


def until_all_are_there(couplings: list[Any], t: int) -> list[Any]:
    """Return what the first meeting of all brings; who comes earlier meets alone, or with some."""

    def come(r: int) -> Any:
        got = None
        while len(couplings[r].assembly.present) < len(couplings):
            got = mean(couplings[r], values(r, t))
        return got

    return side_by_side([lambda r=r: come(r) for r in range(len(couplings))])


def rounded() -> Any:
    """Two replicas send int8 of differences, and then with a third that is new."""
    with lighthouse() as address:
        three = [coupled(r, address, format="int8", extras=lambda r=r: [torch.tensor([float(r)])]) for r in range(3)]

        def play(t: int, who: int) -> list[Any]:
            return side_by_side([lambda r=r: mean(three[r], values(r, t)) for r in range(who)])

        until_all_are_there(three[:2], 0)
        bytes_ = three[0].sent
        two = [play(t, 2) for t in range(1, 5)]
        bytes_ = three[0].sent - bytes_
        extra = three[0].last_extras[0].item()
        with_a_third = until_all_are_there(three, 5)
        after = play(6, 3)
        for c in three:
            c.assembly.close()
        return {"two": two, "bytes": bytes_, "extra": extra, "third": with_a_third, "after": after}


def rounded_steps() -> Any:
    """Two replicas send int4 of pseudo-gradients, the same ones 16 times; another format is refused."""
    with lighthouse() as address:
        three = [coupled(r, address, format=("int4", "int4", "bfloat16")[r], differences=False) for r in range(3)]
        until_all_are_there(three[:2], 0)
        for c in three:
            c.left = None
        steps = [side_by_side([lambda r=r: mean(three[r], values(r, 0)) for r in range(2)])[0][0] for _ in range(16)]

        def tried(r: int) -> Any:
            try:
                while len(three[r].assembly.present) < 3:
                    mean(three[r], values(r, 0))
            except ValueError as error:
                return str(error)
            return "met"

        said = side_by_side([lambda r=r: tried(r) for r in range(3)])
        for c in three:
            c.assembly.close()
        return {"steps": steps, "said": said}


def killed() -> Any:
    """Three processes, of which one is killed."""
    return three_processes(member)


SCENARIOS = (
    "killed",
    "exact",
    "behind",
    "another_model",
    "fails_alone",
    "panics",
    "join",
    "too_few",
    "closed",
    "rounded",
    "rounded_steps",
    "no_lighthouse",
)


def run(*scenarios: str, module: str = "meetings") -> tuple[Any, str]:
    """Run scenarios in a fresh process; return their results by name, and what they wrote to stderr."""
    environment = {**os.environ, "RUST_LOG": "error"}
    done = forked.run(f"tests.strategies.torchft.{module}", *scenarios, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}), flush=True)
