r"""What dying replicas cost: four under the launcher, one killed at random every few seconds and started again.

A training step sleeps, so that a machine with few cores can hold four replicas; the loss is real: a small net on a task
with a known answer. First an undisturbed run, then the disturbed one. Printed are the steps per second of the training
(of the consensus: what an undisturbed replica does counts once), those of all replicas together, and the loss of the
consensus on held-out data at the same step in both runs. A run whose survivors end is an error. Linux, the extra
torchft.

    python -m benchmarks.goodput --seconds 1800 --every 10

With ``--slow 2`` nobody is killed: the last replica's steps take twice as long, and it takes as many inner steps as the
others, or half as many.

    python -m benchmarks.goodput --slow 2 --seconds 120

With ``--devices 2`` a replica is two processes, of which either may be killed; ``--communication-dtype int8`` sends a
quarter of the bytes, and ``--method diloco`` pseudo-gradients, ``streaming_diloco`` in two parts.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import Options
from lightning_entropy.strategies.compression import FORMATS

ROOT = Path(__file__).parents[1]
STEP = 0.04  # seconds of a training step
INNER_STEPS = 10
LOOK = 500  # steps between two looks at the loss


def work(folder: Path) -> None:
    """Train one replica: the launcher's script.

    Args:
        folder: for notes; holds the plan.
    """
    import warnings

    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_entropy as le

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    replica = os.environ["REPLICA_GROUP_ID"]
    plan = Plan(**json.loads((folder / "plan").read_text()))
    last = int(replica) == plan.replicas - 1
    step, length = (STEP * plan.slow, plan.inner_steps) if last else (STEP, INNER_STEPS)
    outer = {"outer_lr": 0.5, "outer_momentum": 0.5}
    method = {
        "parle": le.parle(length),
        "diloco": le.diloco(length, **outer),
        "streaming_diloco": le.streaming_diloco(length, 2, 2, **outer),
    }[plan.method]
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
    inputs = torch.randn(6000, 20)
    targets = teacher(inputs).argmax(1)
    train, test = (TensorDataset(inputs[part], targets[part]) for part in (slice(4000), slice(4000, None)))
    torch.manual_seed(int(replica))

    class Student(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))

        def training_step(self, batch: Any, i: int) -> torch.Tensor:
            time.sleep(step)
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, i: int) -> None:
            self.log("loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Diary(L.Callback):
        own = 0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.own += 1
            rank = trainer.global_rank
            if self.own == 1:
                (folder / f"pid.{replica}.{rank}").write_text(str(os.getpid()))
            if rank == 0 and self.own % length == 0:
                note("steps", [os.getpid(), self.own, trainer.global_step])
            stop = folder / "stop"
            if trainer.global_step % length == 0 and stop.exists():
                trainer.should_stop = True

        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_rank == 0:
                note("loss", [trainer.global_step, float(trainer.callback_metrics["loss"])])

    def note(kind: str, values: Any) -> None:
        with (folder / f"{kind}.{replica}").open("a") as file:
            file.write(f"{json.dumps(values)}\n")

    trainer = L.Trainer(
        accelerator="cpu",
        devices=plan.devices,
        strategy=le.ElasticEntropyStrategy(method, communication_dtype=plan.communication_dtype, membership="torchft"),
        max_epochs=-1,
        val_check_interval=LOOK,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, "at", every_n_train_steps=200, save_last=True), Diary()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    trainer.fit(Student(), loader, DataLoader(test, batch_size=2000), ckpt_path="last")


def notes(folder: Path, kind: str) -> list[Any]:
    """Return what all replicas have noted."""
    files = sorted(folder.glob(f"{kind}.*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith("]")]


@dataclass
class Plan:
    """What the replicas do.

    Attributes:
        replicas: how many.
        devices: processes of one.
        method: by name.
        communication_dtype: of what is sent.
        slow: by how much the last replica's steps take longer.
        inner_steps: of the last replica.
    """

    replicas: int
    devices: int = 1
    method: str = "parle"
    communication_dtype: Any = "float32"
    slow: float = 1.0
    inner_steps: int = INNER_STEPS


def run(folder: Path, seconds: float, plan: Plan, every: float = 0.0) -> dict[str, Any]:
    """Train for a while, killing a replica now and then, and return what was done.

    Args:
        folder: an empty one.
        seconds: from when all replicas train.
        plan: of the replicas.
        every: seconds between two kills; 0: none.
    """
    folder.mkdir()
    (folder / "plan").write_text(json.dumps(asdict(plan)))
    replicas = plan.replicas
    options = ["--replicas", str(replicas), "-m", "benchmarks.goodput", "--work", str(folder)]
    draw = random.Random(0)
    log = (folder / "log").open("w")
    with subprocess.Popen([sys.executable, "-m", "lightning_entropy.launch", *options], cwd=ROOT, stderr=log) as job:
        try:
            while len({note[0] for note in notes(folder, "steps")}) < replicas:
                if job.poll() is not None:
                    raise RuntimeError(f"the replicas must start, see {folder / 'log'}")
                time.sleep(0.5)
            start, before, kills = time.monotonic(), _steps(folder), 0
            due = start + every
            while time.monotonic() < start + seconds:
                time.sleep(0.2)
                if every and time.monotonic() >= due:
                    due += every
                    pid = int((folder / f"pid.{draw.randrange(replicas)}.{draw.randrange(plan.devices)}").read_text())
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:  # it is being started again
                        continue
                    kills += 1
            took, after = time.monotonic() - start, _steps(folder)
            (folder / "stop").touch()
            code = job.wait(timeout=300)
        finally:
            job.kill()
    said = (folder / "log").read_text()
    if code:
        raise RuntimeError(f"the training must end well, got exit code {code}: {said[-2000:]}")
    ended = sum("is started again" in line for line in said.splitlines())
    if ended > kills:
        errors = [line for line in said.splitlines() if re.search(r"Error\b.*:|is started again", line)]
        print(*errors, sep="\n", file=sys.stderr)
    return {
        "kills": kills,
        "others": ended - kills,
        "steps/s": (after[0] - before[0]) / took,
        "steps/s of all": (after[1] - before[1]) / took,
        "losses": {int(step): loss for step, loss in sorted(notes(folder, "loss"))},
    }


def _steps(folder: Path) -> tuple[int, int]:
    """Return how far the training is, and how many steps all processes have taken."""
    found = notes(folder, "steps")
    own: dict[int, int] = {}
    for pid, steps, _ in found:
        own[pid] = max(own.get(pid, 0), steps)
    return max(step for _, _, step in found), sum(own.values())


def compare_slow(slow: float, seconds: float, replicas: int) -> None:
    """Print what a replica that is always slower costs, with as many inner steps as the others and with fewer."""
    fewer = max(1, round(INNER_STEPS / slow))
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "none slower": run(Path(folder) / "none", seconds, Plan(replicas)),
            f"one {slow:g} x as slow": run(Path(folder) / "same", seconds, Plan(replicas, slow=slow)),
            f"the same, L = {fewer} there": run(
                Path(folder) / "own", seconds, Plan(replicas, slow=slow, inner_steps=fewer)
            ),
        }
    for name, result in found.items():
        step, loss = max(result["losses"].items(), default=(0, float("nan")))
        rates = f"{result['steps/s']:.1f} steps/s, of all {result['steps/s of all']:.1f}"
        print(f"{name}: {rates}; loss {loss:.4f} at step {step}")


def main() -> None:
    """Run both trainings and print the comparison."""
    parser = Options(__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of the disturbed run")
    parser.add_argument("--undisturbed", type=float, default=300.0, help="seconds of the other one")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two kills")
    parser.add_argument("--replicas", type=int, default=4, help="how many")
    parser.add_argument("--slow", type=float, help="by how much the last replica's steps take longer; nobody is killed")
    parser.add_argument("--devices", type=int, default=1, help="processes of a replica")
    parser.add_argument(
        "--method", choices=["parle", "diloco", "streaming_diloco"], default="parle", help="of the replicas"
    )
    parser.add_argument("--communication-dtype", choices=FORMATS, default="float32", help="of what replicas send")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    if options.slow is not None:
        compare_slow(options.slow, options.seconds, options.replicas)
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(options.replicas, options.devices, options.method, options.communication_dtype)
        whole = run(Path(folder) / "undisturbed", options.undisturbed, plan)
        hurt = run(Path(folder) / "disturbed", options.seconds, plan, options.every)
    print(f"{options.replicas} replicas, one killed every {options.every:g} s for {options.seconds:g} s")
    print(f"killed: {hurt['kills']}; ended by another's death: {hurt['others']}")
    for key in ("steps/s", "steps/s of all"):
        print(f"{key}: {hurt[key]:.1f}, undisturbed {whole[key]:.1f}, {100 * hurt[key] / whole[key]:.0f} %")
    common = max(set(whole["losses"]) & set(hurt["losses"]), default=None)
    if common is not None:
        print(f"loss at step {common}: {hurt['losses'][common]:.4f}, undisturbed {whole['losses'][common]:.4f}")
    last = max(hurt["losses"], default=None)
    if last is not None:
        print(f"loss at the end, step {last}: {hurt['losses'][last]:.4f}")


if __name__ == "__main__":
    main()
