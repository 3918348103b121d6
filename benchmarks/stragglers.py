r"""What a late replica or a slow link costs: Lightning's ddp against replicas, two ranks whose steps take a set time.

A training step sleeps, so that nothing but the waiting for each other is measured, whatever else the machine does.
One rank, or a random tenth of each rank's batches, is slower; or every packet between the ranks is late. The
strategies take turns in every round. "tied" is elastic_entropy with Lightning's broadcast before every batch left in
place; "torchft" is torchft's own LocalSGD in a loop without Lightning (the extra torchft). The link is made of two
network namespaces and a program that passes their packets on after a while: Linux and root, for that part.

    python -m benchmarks.stragglers --rounds 3
"""

import argparse
import heapq
import json
import os
import random
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.command import Options
from benchmarks.communication import call

ROOT = Path(__file__).parents[1]
INNER_STEPS = 25
STEP = 0.02  # seconds of an undisturbed step
WARM_UP = INNER_STEPS
STRATEGIES = ["ddp", *(["torchft"] if find_spec("torchft") else []), "tied", "elastic_entropy", "diloco"]
# Scenario: share of slow batches, how much longer they take, how much longer all of rank 1's take, the link's delay in
# milliseconds.
SCENARIOS: dict[str, tuple[float, float, float, float]] = {
    "undisturbed": (0.0, 1.0, 1.0, 0.0),
    "a tenth of the batches 5 x as long": (0.1, 5.0, 1.0, 0.0),
    "one replica 1.5 x as slow": (0.0, 1.0, 1.5, 0.0),
    "link, 0 ms": (0.0, 1.0, 1.0, 0.01),
    "link, 20 ms": (0.0, 1.0, 1.0, 20.0),
    "link, 100 ms": (0.0, 1.0, 1.0, 100.0),
}


def delays(scenario: str, rank: int, steps: int) -> list[float]:
    """Return the seconds that each of a rank's steps takes."""
    share, slower, constant, _ = SCENARIOS[scenario]
    draw = random.Random(rank)
    own = STEP * (constant if rank == 1 else 1.0)
    return [own * (slower if draw.random() < share else 1.0) for _ in range(steps)]


def work(name: str, scenario: str, steps: int, answer: Path) -> None:
    """Train on this rank, and write the seconds that the counted steps took."""
    import warnings

    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_entropy as le
    from lightning_entropy.strategies import stopping

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if name == "tied":
        stopping.free_batches = lambda trainer: lambda: None
    seconds = delays(scenario, int(os.environ["NODE_RANK"]), WARM_UP + steps)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 32)

        def training_step(self, batch: Any, i: int) -> torch.Tensor:
            if i == WARM_UP:
                self.start = time.perf_counter()
            time.sleep(seconds[i])
            return self.layer(batch[0]).square().mean()

        def on_train_batch_end(self, outputs: Any, batch: Any, i: int) -> None:
            if i == WARM_UP + steps - 1:
                answer.write_text(json.dumps(time.perf_counter() - self.start))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    relaxation = le.diloco(INNER_STEPS) if name == "diloco" else le.parle(INNER_STEPS)
    strategy: Any = "ddp" if name == "ddp" else le.ElasticEntropyStrategy(relaxation)
    data = TensorDataset(torch.randn(WARM_UP + steps, 32))
    L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(Module(), DataLoader(data, 1))


def work_with_torchft(scenario: str, steps: int, answer: Path) -> None:
    """As :func:`work` with torchft's own LocalSGD; its lighthouse is on the first rank."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import LocalSGD

    torch.set_num_threads(1)
    rank, first, port = (os.environ[key] for key in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
    host = f"10.78.0.{int(rank) + 1}" if first != "127.0.0.1" else first
    seconds = delays(scenario, int(rank), WARM_UP + steps)
    lighthouse = LighthouseServer(bind=f"{first}:{port}", min_replicas=2) if rank == "0" else None
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    layer = torch.nn.Linear(32, 32)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    batch = torch.randn(1, 32)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
        load_state_dict=layer.load_state_dict,
        state_dict=layer.state_dict,
        min_replica_size=2,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        init_sync=False,  # its address for that is the machine's name, which leads out of the link
        store_addr=host,
        store_port=store.port,
        lighthouse_addr=f"http://{first}:{port}",
        hostname=host,
        replica_id=rank,
    )
    with LocalSGD(manager, layer, optimizer, INNER_STEPS):
        for i in range(WARM_UP + steps):
            if i == WARM_UP:
                start = time.perf_counter()
            time.sleep(seconds[i])
            optimizer.zero_grad()
            layer(batch).square().mean().backward()
            optimizer.step()
        answer.write_text(json.dumps(time.perf_counter() - start))
    time.sleep(1)  # the other rank may be in the last meeting still
    manager.shutdown(wait=False)
    if lighthouse is not None:
        lighthouse.shutdown()


def pass_on(files: list[int], delay: float, stop: threading.Event) -> None:
    """Write what arrives at each of two tunnels to the other, after some seconds."""
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while not stop.is_set():
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, to, packet = heapq.heappop(waiting)
            os.write(to, packet)
        wait = min(0.05, waiting[0][0] - now) if waiting else 0.05
        for ready in select.select(files, [], [], max(wait, 0.0))[0]:
            count += 1
            other = files[1 - files.index(ready)]
            heapq.heappush(waiting, (time.monotonic() + delay, count, other, os.read(ready, 65536)))


@contextmanager
def link(milliseconds: float) -> Iterator[list[tuple[str, str]]]:
    """Create two hosts whose packets to each other are late; return their names and interfaces."""
    import fcntl

    tag = f"le{os.getpid() % 10000}"
    pairs = [(f"{tag}{side}", f"t{tag}{side}") for side in "ab"]
    files: list[int] = []
    stop = threading.Event()
    relay = threading.Thread(target=pass_on, args=(files, milliseconds / 1000, stop), daemon=True)
    try:
        for i, (namespace, interface) in enumerate(pairs):
            files.append(os.open("/dev/net/tun", os.O_RDWR))
            # TUNSETIFF: packets without a header, IFF_TUN | IFF_NO_PI
            fcntl.ioctl(files[-1], 0x400454CA, struct.pack("16sH", interface.encode(), 0x1001))
            call("ip", "netns", "add", namespace)
            call("ip", "link", "set", interface, "netns", namespace)
            inside = ("ip", "netns", "exec", namespace)
            call(*inside, "ip", "address", "add", f"10.78.0.{i + 1}/24", "dev", interface)
            call(*inside, "ip", "link", "set", interface, "up")
            call(*inside, "ip", "link", "set", "lo", "up")
        relay.start()
        yield pairs
    finally:
        stop.set()
        if relay.is_alive():
            relay.join()
        for file in files:
            os.close(file)
        for namespace, _ in pairs:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def measure(name: str, scenario: str, steps: int, port: int) -> float:
    """Train on both ranks; return the seconds a step took, of the slower one."""
    late = SCENARIOS[scenario][3]
    with link(late) if late else nullcontext() as pairs, tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, str(i)) for i in range(2)]
        processes = []
        for i in range(2):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NODE_RANK": str(i)}
            environment |= {"LOCAL_RANK": "0", "MASTER_PORT": str(port)}
            environment["MASTER_ADDR"] = "10.78.0.1" if pairs else "127.0.0.1"
            prefix: list[str] = []
            if pairs:
                environment["GLOO_SOCKET_IFNAME"] = pairs[i][1]
                prefix = ["ip", "netns", "exec", pairs[i][0]]
            command = [*prefix, sys.executable, "-m", "benchmarks.stragglers", "--work"]
            command += [name, scenario, str(steps), str(answers[i])]
            processes.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            )
        try:
            said = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if not all(answer.exists() for answer in answers):
            raise RuntimeError(f"{name}, {scenario}: {said[0][-2000:]}\n{said[1][-2000:]}")
        return max(json.loads(answer.read_text()) for answer in answers) / steps


def table(results: dict[tuple[str, str], list[float]], steps: int) -> None:
    """Print the throughput over the undisturbed run's, and over that of a rank that waits for nobody."""
    head = ("scenario", "strategy", "ms a step", "of undisturbed", "range", "of a rank alone")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for (scenario, name), seconds in results.items():
        free = results.get(("undisturbed", name), seconds)
        kept = [a / b for a, b in zip(free, seconds, strict=True)]
        own = max(sum(delays(scenario, rank, WARM_UP + steps)[WARM_UP:]) for rank in range(2)) / steps
        alone = [own + a - STEP for a in free]  # its own delays, and what a step costs beside them
        of_alone = statistics.median(a / b for a, b in zip(alone, seconds, strict=True))
        cells = (
            scenario,
            name,
            f"{1000 * statistics.median(seconds):.1f}",
            f"{statistics.median(kept):.1%}",
            f"{min(kept):.1%} to {max(kept):.1%}",
            f"{of_alone:.1%}",
        )
        print("| " + " | ".join(cells) + " |")


def draw(results: dict[tuple[str, str], list[float]], path: Path) -> None:
    """Draw how much of its undisturbed speed each strategy keeps."""
    import matplotlib.pyplot as plt

    labels = {
        "ddp": "ddp",
        "torchft": "torchft's LocalSGD",
        "diloco": "DiLoCo",
        "elastic_entropy": 'strategy="elastic_entropy"',
    }
    colors = {"ddp": "#9aa0a6", "torchft": "#c9b18c", "diloco": "#7fb3d5", "elastic_entropy": "#1f77b4"}
    labels = {name: label for name, label in labels.items() if ("undisturbed", name) in results}
    scenarios = [key for key in dict.fromkeys(s for s, _ in results) if key not in ("undisturbed", "link, 0 ms")]
    step = 0.8 / len(labels)  # a fifth of the place is left between scenarios
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.27 * len(labels) * len(scenarios)))
    for i, (name, label) in enumerate(labels.items()):
        kept = []
        for scenario in scenarios:
            free, late = results[("undisturbed", name)], results.get((scenario, name), [])
            kept.append(min(100 * statistics.median(free) / statistics.median(late), 100) if late else 0.0)
        places = [j + ((len(labels) - 1) / 2 - i) * step for j in range(len(scenarios))]
        bars = axes.barh(places, kept, 0.92 * step, color=colors[name], label=label)
        axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=9)
    named = {
        scenario: scenario.replace("link, ", "a link with ").replace(" ms", " ms of delay") for scenario in scenarios
    }
    axes.set_yticks(range(len(scenarios)), [named[scenario] for scenario in scenarios])
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("speed kept, % of the undisturbed training's (two replicas, 20 ms a step)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(labels), columnspacing=1.2)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Measure, or train on one rank for it."""
    parser = Options(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--steps", type=int, default=250, help="that are counted, after a warm-up of 25")
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), choices=SCENARIOS, help="what is late")
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES, choices=STRATEGIES, help="to compare")
    parser.add_argument("--plot", type=Path, help="a picture")
    parser.add_argument("--out", type=Path, help="a JSON file of every result")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, scenario, steps, answer = arguments.work
        if name == "torchft":
            work_with_torchft(scenario, int(steps), Path(answer))
        else:
            work(name, scenario, int(steps), Path(answer))
        return
    results: dict[tuple[str, str], list[float]] = defaultdict(list)
    port = 20000 + os.getpid() % 20000
    for i in range(arguments.rounds):
        for scenario in arguments.scenarios:
            for name in arguments.strategies:
                port += 1
                try:
                    results[(scenario, name)].append(measure(name, scenario, arguments.steps, port))
                except (subprocess.CalledProcessError, OSError) as error:
                    print(f"skipped: {scenario}: {getattr(error, 'stderr', '') or error}", file=sys.stderr)
                    break
                print(f"round {i}: {scenario}, {name}: {results[(scenario, name)][-1]:.4f} s", file=sys.stderr)
    measured = {key: values for key, values in results.items() if values}
    table(measured, arguments.steps)
    if arguments.out:
        arguments.out.write_text(json.dumps({": ".join(key): values for key, values in measured.items()}, indent=1))
    if arguments.plot:
        draw(measured, arguments.plot)


if __name__ == "__main__":
    main()
