"""Small fits of two replicas of two ranks, whose weights are sharded by FSDP2 or whole."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_entropy as le
from lightning_entropy.engine.shards import mapped
from lightning_entropy.strategies import ElasticEntropyStrategy
from tests.strategies import runs

EPOCHS = 4
SAVE_AT = 8  # the last batch of an epoch of four, in the middle of a loop of three

METHODS: dict[str, Callable[[], ElasticEntropyStrategy]] = {
    "parle": lambda: replicas(le.parle(3, gamma=1.0, average=0.5)),
    "noise": lambda: replicas(le.Relaxation(inner_steps=3, gamma=1.0, noise=0.1, average=0.5, rho=0.3)),
    "elastic average": lambda: replicas(le.Relaxation(inner_steps=3, rho=0.5, elastic_target="average")),
    "diloco": lambda: replicas(le.diloco(3)),
    "outer adam": lambda: replicas(le.local_sgd(3), outer=torch.optim.Adam),
    "int8": lambda: replicas(le.elastic_sgd(3), communication_dtype="int8"),
    "bfloat16": lambda: replicas(le.elastic_sgd(3), communication_dtype="bfloat16"),
    "streaming": lambda: replicas(le.streaming_diloco(3, 2, 2), communication_dtype="bfloat16"),
}
RESHARDED = ["noise", "diloco", "outer adam", "int8", "bfloat16", "streaming"]
PLANNED = ["noise", "diloco"]  # by a tensor-parallel plan, too
WHOLE = ["noise", "outer adam", "bfloat16"]  # of these, those that have whole weights before or after


def replicas(relaxation: le.Relaxation, **options: Any) -> ElasticEntropyStrategy:
    return ElasticEntropyStrategy(relaxation, replicas=2, seed=3, **options)


class Net(runs.Net):
    """Sharded over the ranks of its replica, or whole."""

    def __init__(self, *, sharded: bool = True, over: str = "data_parallel", batch: int = 4) -> None:
        super().__init__(batch=batch, samples=32)
        self.sharded, self.over = sharded, over
        self.validated: list[float] = []
        self.spread: list[float] = []

    def configure_model(self) -> None:
        if self.sharded and self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            mesh = self.device_mesh[self.over]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def validation_step(self, batch: Any, i: int) -> None:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.validated.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)


class Seen(L.Callback):
    """Keep the loss of every batch, and what has been sent; save where it is told to."""

    def __init__(self, path: Path | None, lose: int | None = None) -> None:
        self.losses: list[float] = []
        self.path, self.lose = path, lose
        self.sent, self.spread = 0.0, None
        self.state: Any = None  # where a resume has begun, or where it will

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        if trainer.global_step == SAVE_AT and self.state is None:
            self.state = state_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        weight = pl_module.net[2].weight
        self.start = (weight.to_local() if isinstance(weight, DTensor) else weight).detach().clone()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == self.lose and trainer.global_rank == 2:  # one of the second replica's shards
            with torch.no_grad():
                pl_module.net[0].weight.to_local().fill_(float("nan"))
        if self.path is not None and trainer.global_step == SAVE_AT:
            self.state = state_of(trainer)
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(self.path.with_name("weights.ckpt"), weights_only=True)
        loops: Any = trainer.strategy._loops
        self.sent = loops.traffic()[0]
        self.spread = loops.metrics().get("entropy/spread", self.spread)


def state_of(trainer: L.Trainer) -> Any:
    """Return a replica's own state, whole: of the loops, and of the optimizer."""
    strategy: Any = trainer.strategy
    state = [[loop.state_dict() for loop in strategy._loops.loops.loops], trainer.optimizers[0].state_dict()["state"]]
    return mapped(state, lambda _, t: (t.full_tensor() if isinstance(t, DTensor) else t).clone())


def fit(
    folder: Path,
    name: str,
    *,
    sharded: bool,
    save: bool = False,
    lose: int | None = None,
    ranks: int = 4,
    own_init: int = 0,
    ckpt_path: Path | None = None,
    batch: int = 4,
    net_class: type[Net] = Net,
    again: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    L.seed_everything(7, verbose=False)
    net = net_class(sharded=sharded, batch=batch)
    if own_init:
        for p in net.parameters():
            torch.nn.init.normal_(p.data, generator=torch.Generator().manual_seed(own_init))
    seen = Seen(folder / "middle.ckpt" if save else None, lose)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=METHODS[name](),
        max_epochs=EPOCHS,
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        default_root_dir=folder,
        **kwargs,
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(folder / "end.ckpt")
    validated = list(net.validated)
    if again:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
            trainer.validate(net, verbose=False)
    return {
        "again": net.validated[len(validated) :],
        "start": seen.start,
        "losses": seen.losses,
        "validated": validated,
        "final": whole(net.state_dict()),
        "sent": seen.sent,
        "spread": seen.spread,
        "state": seen.state,
    }


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in state.items()}


class Alone(Net):
    """One layer is sharded, and the others' gradients would be averaged by nobody."""

    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class Everywhere(Net):
    """Sharded over all ranks, as without a mesh."""

    def configure_model(self) -> None:
        fully_shard(self.net)


class Planned(Net):
    """Shared out by a tensor-parallel plan: the first layer's columns, the last one's rows, all of its bias."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        last = self.net[2]
        self.net[0], self.net[2] = torch.nn.Linear(self.net[0].in_features, 8), torch.nn.Linear(8, last.out_features)
        self.double()

    def configure_model(self) -> None:
        if self.sharded and self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["data_parallel"], plan)


class Both(Net):
    """Shared out by a plan, and by FSDP2 on top of it."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replica", "dp", "tp"))["dp", "tp"]
        parallelize_module(self.net, mesh["tp"], {"0": ColwiseParallel(output_layouts=Replicate())})
        fully_shard(self.net, mesh=mesh["dp"])


class First(Net):
    """Wrapped in the first FSDP."""

    def configure_model(self) -> None:
        self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"))


class Forked(Net):
    """In a process that was forked from one that waits for its weights."""

    def configure_model(self) -> None:
        super().configure_model()
        self.trainer.strategy._start_method = "fork"


class Half(Net):
    """With a gradient scaler, which there is on a GPU alone."""

    def configure_model(self) -> None:
        super().configure_model()
        self.trainer.precision_plugin.precision = "16-mixed"


def refusals(folder: Path) -> dict[str, str]:
    return {
        "layer": error_of(folder, Alone()),
        "world": error_of(folder, Everywhere()),
        "both": error_of(folder, Both()),
        "blocks": error_of(folder, Planned(), communication_dtype="int8"),
        "independent_init": error_of(folder, Net(), independent_init=True),
        "precision": error_of(folder, Half()),
        "first": error_of(folder, First()),
        "start_method": error_of(folder, Forked()),
    }


def error_of(folder: Path, net: L.LightningModule, **options: Any) -> str:
    trainer = runs.trainer(folder, replicas(le.diloco(3), **options), 4)
    try:
        trainer.fit(net)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


class Failing(L.Callback):
    """Fails, on all ranks, and saves."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        if trainer.global_step == 4:
            raise KeyError("a callback's")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def interrupted(folder: Path) -> list[str]:
    """Save after an exception; return what was warned of."""
    trainer = runs.trainer(folder, replicas(le.diloco(3)), 4, callbacks=[Failing(folder / "interrupted.ckpt")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(KeyError):
            trainer.fit(Net())
    return [str(w.message) for w in caught]


def told_of(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Fit, and keep what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = fit(folder, name, **options)
    told["warned"] = [str(w.message) for w in caught]
    return told


def play_fewer(rank: int, folder: Path) -> None:
    """Go on from checkpoints of two ranks each, by two replicas of one rank, with shards and with whole weights.

    Each has the batches of both. And save, for more to go on.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    one: dict[str, Any] = {"ranks": 2, "batch": 8}
    told: dict[str, Any] = {}
    for name in RESHARDED:
        file = folder / name / "middle.ckpt"
        told[name] = told_of(folder / "fewer", name, sharded=True, ckpt_path=file, **one)
        told[f"{name} saved"] = fit(folder / f"{name} one", name, sharded=True, save=True, **one)
        if name in WHOLE:
            told[f"{name} whole"] = told_of(folder / "fewer", name, sharded=False, ckpt_path=file, **one)
            fit(folder / f"{name} one whole", name, sharded=False, save=True, **one)
    for name in PLANNED:
        told[f"{name} unplanned"] = fit(folder / f"{name} unplanned", name, sharded=False, ranks=2, net_class=Planned)
    if rank == 0:
        for file in (folder / "noise" / "middle.ckpt.replicas").iterdir():
            content = torch.load(file)
            content["places"]["/loops/0/slots/net.2.bias/anchor"]["name"] = "net.3.bias"
            torch.save(content, file)
        (folder / "diloco" / "middle.ckpt.replicas" / "1-1.pt").unlink()
    torch.distributed.barrier()
    told["lost"] = told_of(folder / "fewer", "noise", sharded=True, ckpt_path=folder / "noise" / "middle.ckpt", **one)
    told["gone"] = told_of(folder / "fewer", "diloco", sharded=True, ckpt_path=folder / "diloco" / "middle.ckpt", **one)
    torch.save(told, folder / f"fewer.{rank}.pt")


def play_more(rank: int, folder: Path) -> None:
    """Go on by two ranks each from checkpoints of replicas of one, with shards and with whole weights."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    told: dict[str, Any] = {}
    for name in RESHARDED:
        for kind in ("one", "one whole") if name in WHOLE else ("one",):
            file = folder / f"{name} {kind}" / "middle.ckpt"
            told[f"{name} {kind}"] = told_of(folder / "more", name, sharded=True, ckpt_path=file)
    file = folder / "bfloat16" / "middle.ckpt"
    told["whole"] = told_of(folder / "more", "bfloat16", sharded=False, ckpt_path=file)
    told["back"] = told_of(
        folder / "more", "bfloat16", sharded=True, ckpt_path=folder / "bfloat16 whole" / "middle.ckpt"
    )
    torch.save(told, folder / f"more.{rank}.pt")


def play(rank: int, folder: Path) -> None:
    """Play fits one after another, and write what was seen."""
    warnings.filterwarnings("ignore", module=r"torch\.(distributed|nn)")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    told: dict[str, Any] = {}
    for name in METHODS:
        told[name] = fit(folder / name, name, sharded=True, save=True)
        told[f"{name} whole"] = fit(folder / f"{name} whole", name, sharded=False, save=True)
    for name in ("noise", "diloco", "outer adam", "int8"):
        told[f"{name} resumed"] = fit(
            folder / f"{name} resumed", name, sharded=True, ckpt_path=folder / name / "middle.ckpt", again=True
        )
    for name in PLANNED:
        planned: dict[str, Any] = {"sharded": True, "net_class": Planned}
        told[f"{name} planned"] = fit(folder / f"{name} planned", name, save=True, **planned)
        file = folder / f"{name} planned" / "middle.ckpt"
        told[f"{name} planned, resumed"] = fit(folder / "planned", name, ckpt_path=file, again=True, **planned)
    warnings.filterwarnings("ignore", message="replica 1 has nan or inf")
    told["lost"] = fit(folder / "lost", "diloco", sharded=True, lose=3)
    told["own init"] = fit(folder / "own init", "diloco", sharded=True, own_init=rank + 1)
    told["refused"] = refusals(folder)
    told["interrupted"] = interrupted(folder)
    told["clipped"] = fit(folder / "clipped", "noise", sharded=True, gradient_clip_val=0.05)
    told["clipped whole"] = fit(folder / "clipped whole", "noise", sharded=False, gradient_clip_val=0.05)
    torch.save(told, folder / f"{rank}.pt")
