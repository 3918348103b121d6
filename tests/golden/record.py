"""Golden runs: what every method computes, recorded once, so that a change of the house can be held against it.

``python -m tests.golden.record FOLDER`` writes ``runs.json`` and ``checkpoints/`` there.
``python -m tests.golden.record`` runs everything again and compares with the recorded numbers bit for bit, which the
processor they were recorded on must have; ``tests/test_golden.py`` compares with a tolerance. Only public names of
lightning_entropy are used, so that it runs on any version.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_entropy as le

HERE = Path(__file__).parent
CUT = 7  # step at which a run is saved: in the middle of a loop of 3 or 5
STEPS = 13

RELAXATIONS: dict[str, Callable[[], le.Relaxation]] = {
    "entropy_sgd": lambda: le.entropy_sgd(5, le.Scoping(0.5, 0.1), 0.01),
    "entropy_sgd_coupled": lambda: le.entropy_sgd(5, 0.5, 0.01, coupled=True),
    "entropy_sgd_reset_momentum": lambda: le.entropy_sgd(3, 0.5, 0.0, reset_momentum=True, outer_lr=0.7),
    "explicit": lambda: le.Relaxation(inner_steps=3, gamma=0.5, average=0.5, explicit=True),
    "hamilton_jacobi": lambda: le.hamilton_jacobi(5, 2.0, outer_momentum=0.5),
    "lookahead": lambda: le.lookahead(5, 0.5),
    "two_timescale": lambda: le.two_timescale(1.0, 0.01, 0.1),
    "heat": lambda: le.heat(1, 1e3),
    "heat_3": lambda: le.heat(3, le.Widening(1e3, 2.0, 4)),
    "heat_filter": lambda: le.heat(1, 1e3, scale="filter"),
    "parle": lambda: le.parle(3, le.Scoping(0.1, 0.1), 0.5),
    "parle_average": lambda: le.parle(3, 0.1, 0.5, elastic_target="average"),
    "elastic_sgd": lambda: le.elastic_sgd(3, 0.5),
    "local_sgd": lambda: le.local_sgd(3),
    "diloco": lambda: le.diloco(3),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, 0.02),
}


def numbers(*shape: int, start: int = 0) -> Tensor:
    """Deterministic numbers in [-1, 1], of integers alone."""
    count = int(torch.tensor(shape).prod())
    values = [((start + 1) * 7919 + i * 104729) % 2003 / 1001.5 - 1 for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).view(shape)


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, start: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(numbers(3, 4, start=start).to(dtype))
        self.bias = torch.nn.Parameter(numbers(3, start=start + 50).to(dtype))

    def loss(self, step: int) -> Tensor:
        """Elementwise but for a sum, so that processors agree on nearly all of it."""
        x = numbers(4, start=step).to(self.weight.dtype)
        y = numbers(3, start=step + 500).to(self.weight.dtype)
        return ((self.weight * x).sum(1) + self.bias - y).square().sum()


def plain(relaxation: le.Relaxation, optimizer: str, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Any, ...]]:
    """Yield (net, optimizer, loop, step) after every step of a run without a Trainer."""
    net = Net(dtype)
    o = OPTIMIZERS[optimizer](net.parameters())
    loop = le.relax(o, relaxation, seed=5)
    yield from steps(net, o, loop, 0)


def steps(net: Net, optimizer: Any, loop: le.InnerOuter, start: int) -> Iterator[tuple[Any, ...]]:
    for step in range(start, STEPS):
        loop.begin()
        optimizer.zero_grad()
        net.loss(step).backward()
        optimizer.step()
        yield net, optimizer, loop, step


def state(net: Net, loop: le.InnerOuter) -> list[str]:
    with loop.at_anchor():
        x = [p.detach().clone() for p in net.parameters()]
    z = [] if loop.relaxation.perturb else loop.average  # which smoothing has not
    return [*hexed([*x, *loop.anchor, *z]), str(loop.inner_step), str(loop.outer_step)]


def hexed(tensors: Any) -> list[str]:
    return [float(v).hex() for t in tensors for v in t.detach().double().flatten()]


def saved(net: Net, optimizer: Any, loop: le.InnerOuter) -> dict[str, Any]:
    with loop.at_anchor():
        module = {k: v.clone() for k, v in net.state_dict().items()}
    return {"module": module, "optimizer": optimizer.state_dict(), "loop": loop.state_dict()}


def resumed(content: dict[str, Any], relaxation: le.Relaxation, optimizer: str) -> list[str]:
    """The end of a run that goes on from a saved state."""
    net = Net(start=9)
    o = OPTIMIZERS[optimizer](net.parameters())
    loop = le.relax(o, relaxation, seed=1)
    with loop.at_anchor():
        net.load_state_dict(content["module"])
    o.load_state_dict(content["optimizer"])
    loop.load_state_dict(content["loop"])
    for _ in steps(net, o, loop, CUT):
        pass
    return state(net, loop)


def replicas(relaxation: le.Relaxation, optimizer: str) -> list[str]:
    """Three replicas in one process, each with the others' tensors of the same moment as the mean."""
    nets = [Net(start=100 * r) for r in range(3)]
    optimizers = [OPTIMIZERS[optimizer](net.parameters()) for net in nets]
    given: list[list[list[Tensor]]] = [[], [], []]

    def mean_of(r: int) -> Callable[[list[Tensor]], Callable[[], list[Tensor]]]:
        def start(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
            given[r].append([t.detach().clone() for t in tensors])
            i = len(given[r]) - 1
            # A replica that comes later to this exchange is taken at what it gave last.
            return lambda: [
                torch.stack([given[q][min(i, len(given[q]) - 1)][k] for q in range(3) if given[q]]).mean(0)
                for k in range(len(tensors))
            ]

        return start

    loops = [le.relax(o, relaxation, replica_mean=mean_of(r), seed=r) for r, o in enumerate(optimizers)]
    for step in range(STEPS):
        for net, o, loop, r in zip(nets, optimizers, loops, range(3), strict=True):
            loop.begin()
            o.zero_grad()
            net.loss(step + 1000 * r).backward()
            o.step()
    return [value for net, loop in zip(nets, loops, strict=True) for value in state(net, loop)]


# Under the Trainer


class Module(L.LightningModule):
    def __init__(self, optimizer: str = "sgd", manual: bool = False) -> None:
        super().__init__()
        self.net = Net()
        self.other = Net(start=9) if manual else None
        self.kind, self.automatic_optimization = optimizer, not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        step = int(batch[0][0])
        if self.automatic_optimization:
            return self.net.loss(step)
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(net.loss(step))
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        first = OPTIMIZERS[self.kind](self.net.parameters())
        return first if self.other is None else [first, OPTIMIZERS["adamw"](self.other.parameters())]


CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "entropy": lambda: le.EntropySGD(5, 0.5, 0.01, seed=3),
    "heat": lambda: le.HeatSmoothing(2, 1e3, seed=3),
    "lookahead": lambda: le.InnerOuterCallback(le.lookahead(5)),
}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(STEPS)), batch_size=1)


def fit(
    module: Module, callbacks: list[L.Callback], steps: int = STEPS, ckpt_path: Any = None, **kwargs: Any
) -> L.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), enable_model_summary=False,
            callbacks=callbacks, default_root_dir=tempfile.gettempdir(), **kwargs,
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


class Seen(L.Callback):
    """x after every so many batches; not after the last, which may close a loop."""

    def __init__(self, every: int) -> None:
        self.every, self.x, self.count = every, list[str](), 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.count += 1
        if self.count % self.every == 0 and trainer.global_step < trainer.max_steps:
            self.x = hexed(v for v in pl_module.state_dict().values())


def saver(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path.parent, path.stem, every_n_train_steps=CUT, save_top_k=-1)


def trained(name: str, every: int, **options: Any) -> list[str]:
    seen = Seen(every)
    kwargs = {k: options.pop(k) for k in list(options) if k == "accumulate_grad_batches"}
    fit(Module(**options), [CALLBACKS[name](), seen], **kwargs)
    return seen.x


class Rank(L.Callback):
    """Write what a rank has at the end of its last whole loop to a file."""

    def __init__(self, folder: str) -> None:
        self.folder, self.x, self.count = folder, list[str](), 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.count += 1
        if trainer.global_step == 12:
            self.x = hexed(pl_module.parameters())

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        Path(self.folder, f"{trainer.global_rank}.json").write_text(json.dumps(self.x))


def two_replicas(
    relaxation: le.Relaxation, dtype: Any, ckpt_path: Any = None, callbacks: list[L.Callback] | None = None
) -> list[str]:
    strategy = le.ElasticEntropyStrategy(relaxation, start_method="fork", communication_dtype=dtype, seed=4)
    with tempfile.TemporaryDirectory() as folder:
        L.seed_everything(1, verbose=False)
        fit(Module(), [Rank(folder), *(callbacks or [])], strategy=strategy, devices=2, ckpt_path=ckpt_path)
        return [v for r in range(2) for v in json.loads(Path(folder, f"{r}.json").read_text())]


REPLICAS: dict[str, tuple[Callable[[], le.Relaxation], str]] = {
    "parle float32": (lambda: le.parle(3, 0.1, 0.5), "float32"),
    "elastic_sgd int8": (lambda: le.elastic_sgd(3, 0.5), "int8"),
    "diloco bfloat16": (lambda: le.diloco(3), "bfloat16"),
}
PLAIN_CHECKPOINTS = [
    "entropy_sgd", "lookahead", "hamilton_jacobi", "heat_3", "diloco", "two_timescale"
]  # fmt: skip


def runs() -> dict[str, list[str]]:
    """Every run, from the start."""
    found: dict[str, list[str]] = {}
    for name, relaxation in RELAXATIONS.items():
        for optimizer in OPTIMIZERS:
            for net, _, loop, step in plain(relaxation(), optimizer):
                if step in (2, CUT - 1, STEPS - 1):
                    found[f"plain {name} {optimizer} {step}"] = state(net, loop)
    for name in ("entropy_sgd", "heat"):
        for dtype in (torch.float32, torch.bfloat16):
            net, _, loop, _ = list(plain(RELAXATIONS[name](), "sgd", dtype))[-1]
            found[f"plain {name} {dtype}"] = state(net, loop)
    for name in ("parle", "parle_average", "elastic_sgd", "local_sgd", "diloco"):
        found[f"replica_mean {name}"] = replicas(RELAXATIONS[name](), "sgd")
    for name in CALLBACKS:
        every = 2 if name == "heat" else 5
        found[f"trainer {name}"] = trained(name, every)
        found[f"trainer {name} adamw"] = trained(name, every, optimizer="adamw")
        found[f"trainer {name} manual"] = trained(name, every, manual=True)
        found[f"trainer {name} accumulated"] = trained(name, 2 * every, accumulate_grad_batches=2)
    for name, (relaxation, dtype) in REPLICAS.items():
        found[f"strategy {name}"] = two_replicas(relaxation(), dtype)
    return found


def write_checkpoints(folder: Path) -> None:
    """Save runs in the middle of a loop, in the format of the version that runs this."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in PLAIN_CHECKPOINTS:
        for net, optimizer, loop, step in plain(RELAXATIONS[name](), "sgd"):
            if step == CUT - 1:
                torch.save(saved(net, optimizer, loop), folder / f"{name}.pt")
                break
    for name in CALLBACKS:
        fit(Module(), [CALLBACKS[name](), saver(folder / f"{name}.ckpt")], CUT + 1)
    fit(Module(manual=True), [CALLBACKS["entropy"](), ModelCheckpoint(folder, "pair", every_n_train_steps=14)], 16)
    for name, (relaxation, dtype) in REPLICAS.items():
        two_replicas(relaxation(), dtype, callbacks=[saver(folder / f"{name.replace(' ', '_')}.ckpt")])


def from_checkpoints(folder: Path) -> dict[str, list[str]]:
    """Every checkpoint, trained on."""
    found: dict[str, list[str]] = {}
    for name in PLAIN_CHECKPOINTS:
        content = torch.load(folder / f"{name}.pt", weights_only=True)
        found[f"checkpoint {name}"] = resumed(content, RELAXATIONS[name](), "sgd")
    # Of version 0.1 alone, which measured gamma: what it had measured is said as what it came to, to rounding.
    content = torch.load(HERE / "checkpoints/entropy_sgd_auto.pt", weights_only=True)
    spring = le.Scoping(content["loop"]["gamma_start"] / 1.001, 1e-3)
    found["checkpoint entropy_sgd_auto"] = resumed(content, le.entropy_sgd(3, spring, 0.0), "sgd")
    for name in CALLBACKS:
        seen = Seen(3 if name != "heat" else 5)  # 7 + 3 steps are two loops of five, 7 + 5 six of two
        fit(Module(), [CALLBACKS[name](), seen], ckpt_path=folder / f"{name}.ckpt")
        found[f"checkpoint {name} trainer"] = seen.x
    seen = Seen(3)
    fit(Module(manual=True), [CALLBACKS["entropy"](), seen], 2 * STEPS, ckpt_path=folder / "pair.ckpt")
    found["checkpoint pair trainer"] = seen.x
    for name, (relaxation, dtype) in REPLICAS.items():
        found[f"checkpoint {name}"] = two_replicas(relaxation(), dtype, folder / f"{name.replace(' ', '_')}.ckpt")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print(__doc__)
        return 2
    if arguments:
        folder = Path(arguments[0])
        write_checkpoints(folder / "checkpoints")
        found = runs() | from_checkpoints(folder / "checkpoints")
        (folder / "runs.json").write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
        print(f"{len(found)} runs recorded in {folder}")
        return 0
    recorded = json.loads((HERE / "runs.json").read_text())
    found = runs() | from_checkpoints(HERE / "checkpoints")
    different = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    for name in different:
        print(f"differs: {name}")
    print(f"{len(recorded) - len(different)} of {len(recorded)} runs agree bit for bit")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
