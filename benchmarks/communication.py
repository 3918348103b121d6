r"""What replicas save on a slow link: Lightning's ddp against elastic_entropy and elastic_sgd, between two hosts.

The hosts are network namespaces of this machine, joined by a veth pair that ``tc`` throttles; bytes are read from the
interface's own counters, so they include headers, acknowledgements and whatever Lightning sends. All strategies and
links take turns in every round, so that other load affects them alike. Needs Linux, root, ``ip`` and ``tc``.

    python -m benchmarks.communication --rounds 3
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command import Options

ROOT = Path(__file__).parents[1]
INNER_STEPS = 25
LINKS = {"none": None, "1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit"}
# Name: strategy, its arguments, steps on a throttled link. ddp needs no more to show what a step costs.
WARM_UP = 37  # steps that are not counted; it ends in the middle of a loop, so that 50 steps have two whole exchanges
RUNS: dict[str, dict[str, Any]] = {
    "single process": {"steps": 50},
    "rho = 0": {"steps": 50},
    "ddp": {"steps": 15},
    "elastic_entropy": {"steps": 50},
    "elastic_sgd": {"steps": 50},
    "elastic_entropy bfloat16": {"steps": 50},
    "elastic_entropy int8": {"steps": 50},
    "elastic_entropy int4": {"steps": 50},
}


def make_strategy(name: str) -> Any:
    """Return the strategy of a run."""
    import lightning_entropy as le

    if name in ("ddp", "single process"):
        return "ddp" if name == "ddp" else "auto"
    if name == "rho = 0":
        return le.ElasticEntropyStrategy(le.entropy_sgd(INNER_STEPS))
    kind, _, dtype = name.partition(" ")
    relaxation = le.parle(INNER_STEPS) if kind == "elastic_entropy" else le.elastic_sgd(INNER_STEPS)
    return le.ElasticEntropyStrategy(relaxation, communication_dtype=dtype or "float32")  # type: ignore[arg-type]


def work(net: str, name: str, steps: int, batch: int, interface: str, answer: Path, blocks: int) -> None:
    """Train on this host and write the measurements to a file.

    With ``blocks``, every second block of INNER_STEPS steps is at 100 Mbit/s, and the seconds of each are written.
    """
    import warnings

    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if net == "fully connected":
        sizes = (784, 1024, 1024, 10)
        layers: list[torch.nn.Module] = []
        for wide, narrow in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(wide, narrow), torch.nn.ReLU()]
        model: torch.nn.Module = torch.nn.Sequential(*layers[:-1])
        shape: tuple[int, ...] = (784,)
    else:
        from recipes.allcnn import AllCNN

        model, shape = AllCNN(), (3, 32, 32)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    def count(what: str) -> int:
        path = Path(f"/sys/class/net/{interface}/statistics/{what}_bytes")
        return int(path.read_text()) if path.exists() else 0

    class Blocks(L.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx < WARM_UP or (batch_idx - WARM_UP) % INNER_STEPS:
                return
            now, block = time.perf_counter(), (batch_idx - WARM_UP) // INNER_STEPS
            if block:
                self.seconds.append(now - self.start)
            if block == blocks:
                answer.write_text(json.dumps(self.seconds))
            throttle(interface, LINKS["100 Mbit/s"] if block % 2 else "100gbit", "replace")
            self.start = time.perf_counter()

    class Meter(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == WARM_UP:
                self.start, self.bytes, self.waited = time.perf_counter(), count("tx"), self.wait(trainer)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == WARM_UP + steps:
                seconds = time.perf_counter() - self.start
                result = {
                    "samples": steps * batch / seconds,
                    "bytes": (count("tx") - self.bytes) / steps,
                    "waiting": (self.wait(trainer) - self.waited) / seconds,
                }
                answer.write_text(json.dumps(result))

        def wait(self, trainer: Any) -> float:
            loops = getattr(trainer.strategy, "_loops", None)
            return 0.0 if loops is None else loops.traffic()[1]

    data = TensorDataset(torch.randn(batch * 4, *shape), torch.randint(10, (batch * 4,)))
    one = name == "single process"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1 if one else 2,
        strategy=make_strategy(name),
        max_steps=WARM_UP + steps if not blocks else WARM_UP + blocks * INNER_STEPS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Blocks() if blocks else Meter()],
    )

    class Repeat:
        def __len__(self) -> int:
            return WARM_UP + steps + blocks * INNER_STEPS + 2

        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from DataLoader(data, batch)

    trainer.fit(Module(), Repeat())


def reason_to_skip() -> str | None:
    """Return what is missing to run this, if anything."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing (iproute2)"
    try:
        with hosts(None):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def call(*command: str) -> None:
    """Run a command; raise an error if it fails."""
    subprocess.run(command, check=True, capture_output=True, text=True)


def throttle(interface: str, rate: str | None, how: str, *inside: str) -> None:
    """Limit the outgoing rate of an interface."""
    shape = ("root", "tbf", "rate", str(rate), "burst", "64kb", "latency", "50ms")
    call(*inside, "tc", "qdisc", how, "dev", interface, *shape)


@contextmanager
def hosts(rate: str | None) -> Iterator[list[tuple[str, str]]]:
    """Create two linked hosts; return their names and interfaces."""
    tag = f"le{os.getpid() % 10000}"
    pairs = [(f"{tag}{side}", f"v{tag}{side}") for side in "ab"]
    try:
        for namespace, _ in pairs:
            call("ip", "netns", "add", namespace)
        call("ip", "link", "add", pairs[0][1], "type", "veth", "peer", "name", pairs[1][1])
        for i, (namespace, interface) in enumerate(pairs):
            call("ip", "link", "set", interface, "netns", namespace)
            inside = ("ip", "netns", "exec", namespace)
            call(*inside, "ip", "address", "add", f"10.77.0.{i + 1}/24", "dev", interface)
            call(*inside, "ip", "link", "set", interface, "up")
            call(*inside, "ip", "link", "set", "lo", "up")
            if rate is not None:
                throttle(interface, rate, "add", *inside)
        yield pairs
    finally:
        for namespace, interface in pairs:
            subprocess.run(["ip", "link", "delete", interface], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def measure(net: str, name: str, rate: str | None, batch: int, blocks: int = 0) -> Any:
    """Train on both hosts; return the mean of their measurements, or with ``blocks`` the seconds of each block."""
    steps = RUNS[name]["steps"]
    with hosts(rate) as pairs, tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, str(i)) for i in range(2)]
        processes = []
        for i, (namespace, interface) in enumerate(pairs):
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": interface,
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29500",
                "NODE_RANK": str(i),
                "LOCAL_RANK": "0",
            }
            task = (net, name, str(steps), str(batch), interface, str(answers[i]), str(blocks))
            command = [
                "ip",
                "netns",
                "exec",
                namespace,
                sys.executable,
                "-m",
                "benchmarks.communication",
                "--work",
                *task,
            ]
            processes.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            )
        try:
            said = [process.communicate(timeout=600)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if not all(answer.exists() for answer in answers):
            raise RuntimeError(f"{net}, {name}, {rate}: {said[0][-2000:]}\n{said[1][-2000:]}")
        results = [json.loads(answer.read_text()) for answer in answers]
    if blocks:
        return [statistics.mean(pair) for pair in zip(*results, strict=True)]
    return {key: statistics.mean(result[key] for result in results) for key in results[0]}


def alternate(net: str, name: str, batch: int, blocks: int) -> None:
    """Print the throughput at 100 Mbit/s relative to no limit, the limit coming and going within one run."""
    seconds = measure(net, name, None, batch, blocks)
    free, limited = seconds[::2], seconds[1::2]
    # Each limited block against the mean of the free ones before and after it.
    ratios = [(a + b) / 2 / c for a, b, c in zip(free, free[1:], limited, strict=False)]
    print(
        f"{net}, {name}: at 100 Mbit/s {statistics.median(ratios):.1%} of no limit, {min(ratios):.1%} to "
        f"{max(ratios):.1%} in {len(ratios)} pairs of {INNER_STEPS} steps of one run"
    )


def table(net: str, results: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """Print medians and ranges.

    "lost" is the share of time that an independent replica (rho = 0) on the unthrottled link would not have needed;
    "waits" is what our own exchanges were waited for.
    """

    def median(link: str, name: str, key: str) -> float:
        values = [r[key] for r in results.get((link, name), [])]
        return statistics.median(values) if values else float("nan")

    print(f"\n{net}\n")
    head = ("link", "strategy", "samples/s", "range", "x ddp", "of no limit", "lost", "kB/step", "of ddp", "waits")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for link in LINKS:
        for name in RUNS:
            runs = results.get((link, name))
            if not runs:
                continue
            speeds = [r["samples"] for r in runs]
            speed, sent = statistics.median(speeds), median(link, name, "bytes")
            ratios = [a["samples"] / b["samples"] for a, b in zip(runs, results.get((link, "ddp"), []), strict=False)]
            kept = [a["samples"] / b["samples"] for a, b in zip(runs, results[("none", name)], strict=False)]
            free = results.get(("none", "rho = 0"), [])
            lost = [1 - a["samples"] / b["samples"] for a, b in zip(runs, free, strict=False)]
            cells = (
                link,
                name,
                f"{speed:.0f}",
                f"{min(speeds):.0f} to {max(speeds):.0f}",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{statistics.median(kept):.1%} ({min(kept):.1%} to {max(kept):.1%})",
                f"{statistics.median(lost):.1%}" if lost else "",
                f"{sent / 1e3:.1f}",
                f"{sent / median(link, 'ddp', 'bytes'):.2%}",
                f"{median(link, name, 'waiting'):.1%}",
            )
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, or train on one host for it."""
    parser = Options(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--nets", nargs="*", default=["fully connected", "All-CNN-BN"], help="to train")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), help="strategies and formats to compare")
    parser.add_argument("--links", nargs="*", default=list(LINKS), help="limits of the link")
    parser.add_argument("--batch", type=int, nargs=2, default=(128, 32), help="of the two nets")
    parser.add_argument("--out", type=Path, help="a JSON file for every single result")
    parser.add_argument("--blocks", type=int, default=21, help="of the runs in which the limit comes and goes; 0: none")
    parser.add_argument("--work", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        net, name, steps, batch, interface, answer, blocks = arguments.work
        work(net, name, int(steps), int(batch), interface, Path(answer), int(blocks))
        return
    reason = reason_to_skip()
    if reason is not None:
        print(f"skipped: {reason}")
        return
    everything: dict[str, Any] = {}
    for net in arguments.nets:
        batch = arguments.batch[0 if net == "fully connected" else 1]
        results: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        for i in range(arguments.rounds):
            for name in arguments.runs:
                for link in arguments.links:
                    if name == "single process" and link != "none":
                        continue
                    start = time.monotonic()
                    results[(link, name)].append(measure(net, name, LINKS[link], batch))
                    took = time.monotonic() - start
                    print(
                        f"{net}, round {i}: {name}, {link}: {results[(link, name)][-1]} in {took:.0f} s",
                        file=sys.stderr,
                    )
        if results:
            table(net, results)
        for name in arguments.runs if arguments.blocks else []:
            if name.startswith("elastic"):
                alternate(net, name, batch, arguments.blocks)
        everything[net] = {f"{link}: {name}": values for (link, name), values in results.items()}
        if arguments.out:
            arguments.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
