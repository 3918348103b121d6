"""Whoever looks sees the consensus; a replica's own state stays beside it."""

import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_entropy as le
from tests.strategies.runs import FORK_WARNINGS, Net, Record, Samples, external, fit, strategy, trainer

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


PARLE = le.parle(3, 0.1, 0.3, 0.25)
STREAMING = le.streaming_diloco(4, 2, 3)


def mean(ranks: list[dict[str, Any]], key: str) -> list[Tensor]:
    return [sum(parts) / len(ranks) for parts in zip(*(rank[key] for rank in ranks), strict=True)]


class Looks(Record):
    """What the module holds at every moment someone may look, with this replica's x and buffers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.extra = {"looks": []}

    def look(self, moment: str, trainer: L.Trainer, module: Any) -> None:
        strategy: Any = trainer.strategy
        loops = strategy._loops
        own = loops.consensus.own()
        self.extra["looks"].append(
            {
                "moment": moment,
                "held": [p.detach().clone() for p in module.parameters()],
                "buffers": [b.clone() for b in module.buffers() if b.is_floating_point()],
                "dict": [v.clone() for k, v in module.state_dict().items() if "running" not in k and "num" not in k],
                "x": [x.clone() for x in loops.loops.loops[0].anchor],
                "own": [own[n].clone() for n, b in module.named_buffers() if b.is_floating_point()],
                "inner_step": loops.loops.loops[0].inner_step,
            }
        )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.look("validation", trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.look("validation end", trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.look("epoch end", trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.look("train end", trainer, pl_module)
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize("every", [5, 8])
def test_validation_epoch_end_and_the_end_of_fit_see_the_consensus(tmp_path: Path, every: int) -> None:
    """In the middle of an inner loop, and where validation is not at the end of the epoch."""
    module = Net(bn=True)
    ranks = fit(
        tmp_path,
        strategy(PARLE),
        3,
        module=module,
        callbacks=[Looks(tmp_path)],
        val_check_interval=every,
        limit_val_batches=2,
        num_sanity_val_steps=1,
    )
    looks = list(zip(*(rank["looks"] for rank in ranks), strict=True))
    assert {look[0]["moment"] for look in looks} == {"validation", "validation end", "epoch end", "train end"}
    assert {look[0]["inner_step"] for look in looks} - {0}
    for look in looks:
        consensus, buffers = mean(list(look), "x"), mean(list(look), "own")
        for rank in look:
            torch.testing.assert_close(rank["held"], consensus, rtol=0, atol=1e-14)
            torch.testing.assert_close(rank["dict"], consensus, rtol=0, atol=1e-14)
            torch.testing.assert_close(rank["buffers"], buffers, rtol=0, atol=1e-14)
        assert not torch.equal(look[0]["x"][0], look[1]["x"][0])
        assert not torch.equal(look[0]["own"][0], look[1]["own"][0])
    assert len({rank["metrics"]["val_loss"] for rank in ranks}) == 1
    for (_, ours), theirs in zip(module.state_dict().items(), ranks[0]["final"].values(), strict=True):
        assert torch.equal(ours, theirs)  # what the parent process gets back


def test_fragments_at_different_phases_are_seen_at_their_x(tmp_path: Path) -> None:
    """The last outer steps', whatever is under way: every replica has the same, and the consensus is it."""
    kwargs: dict[str, Any] = {"val_check_interval": 5, "limit_val_batches": 2, "make": lambda: Net(bn=True)}
    ranks = fit(tmp_path, strategy(STREAMING), 2, callbacks=[Looks(tmp_path)], **kwargs)
    looks = list(zip(*(rank["looks"] for rank in ranks), strict=True))
    assert {look[0]["inner_step"] for look in looks} - {0}
    for look in looks:
        for rank in look:
            assert all(torch.equal(a, b) for a, b in zip(rank["x"], look[0]["x"], strict=True))
            torch.testing.assert_close(rank["held"], look[0]["x"], rtol=0, atol=1e-14)
            torch.testing.assert_close(rank["dict"], look[0]["x"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("relaxation", [PARLE, STREAMING])
def test_looking_changes_nothing(tmp_path: Path, relaxation: le.Relaxation) -> None:
    """Validation, checkpoints and epoch ends leave training as it is, bit for bit."""
    busy = fit(
        tmp_path / "busy",
        strategy(relaxation),
        2,
        make=lambda: Net(bn=True),
        callbacks=[ModelCheckpoint(tmp_path / "busy", every_n_train_steps=2, save_top_k=-1)],
        val_check_interval=5,
        limit_val_batches=2,
    )
    idle = fit(tmp_path / "idle", strategy(relaxation), 2, make=lambda: Net(bn=True))
    for left, right in zip(busy, idle, strict=True):
        for y, other in zip(left["iterates"], right["iterates"], strict=True):
            assert all(torch.equal(p, q) for p, q in zip(y, other, strict=True))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_every_checkpoint_has_the_consensus(tmp_path: Path, n: int, weights_only: bool) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_weights_only=weights_only)
    ranks = fit(
        tmp_path, strategy(PARLE), n, make=lambda: Net(bn=True), callbacks=[Anchors(tmp_path), keep], max_epochs=1
    )
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda f: int(f.stem.split("step=")[1]))
    assert len(files) == 4
    for file in files:
        step = int(file.stem.split("step=")[1])
        checkpoint = torch.load(file, weights_only=True)
        at = [rank["x"][step - 1] for rank in ranks]
        for name in at[0]:
            consensus = sum(x[name] for x in at) / n
            torch.testing.assert_close(checkpoint["state_dict"][name], consensus, rtol=0, atol=1e-14)
        folder = Path(f"{file}.replicas")
        assert folder.exists() != weights_only
        if not weights_only:
            assert sorted(f.name for f in folder.iterdir()) == [f"{r}.pt" for r in range(n)]


class Anchors(Record):
    """Every rank's x and buffers after every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.extra = {"x": []}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        strategy: Any = trainer.strategy
        loop = strategy._loops.loops.loops[0]
        names = [name for name, _ in pl_module.named_parameters()]
        x = {name: value.clone() for name, value in zip(names, loop.anchor, strict=True)}
        buffers = {name: b.clone() for name, b in pl_module.named_buffers() if b.is_floating_point()}
        self.extra["x"].append({**x, **buffers})


class Breaks(L.Callback):
    """Raise on some ranks after some step, in training or in validation."""

    def __init__(self, ranks: set[int], step: int) -> None:
        self.ranks, self.step = ranks, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank in self.ranks and trainer.global_step == self.step:
            time.sleep(0.5)  # what is under way arrives
            raise ValueError("as planned")


@pytest.mark.parametrize("ranks", [{0, 1}, {0}])
def test_an_exception_saves_without_a_collective(tmp_path: Path, ranks: set[int]) -> None:
    """Also where the other replica does not come; and what is saved are anchors, not inner iterates."""

    def work(rank: int) -> None:
        save = ModelCheckpoint(tmp_path, "broken", save_on_exception=True)
        callbacks = [Breaks(ranks, 5), save, Stored(tmp_path)]
        run = trainer(tmp_path, strategy(PARLE, start_method="popen"), 2, callbacks=callbacks)
        run.fit(Net())

    said = external(2, work)
    assert said[0] == "ValueError: as planned"
    assert said[1] == "ValueError: as planned" if ranks == {0, 1} else "ReplicaLost: rank 0" in said[1]
    checkpoint = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    saved = list(checkpoint["state_dict"].values())
    x, y, held = torch.load(tmp_path / "0.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(saved, held, strict=True))
    if ranks == {0, 1}:
        other = torch.load(tmp_path / "1.pt", weights_only=True)[0]
        # The mean had arrived, three batches after it was sent.
        consensus = [(a + b) / 2 for a, b in zip(x, other, strict=True)]
        torch.testing.assert_close(saved, consensus, rtol=0, atol=1e-14)
    assert not torch.equal(saved[0], y[0])


class Stored(L.Callback):
    """Write x, y and what the module holds when something breaks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        strategy: Any = trainer.strategy
        loop = strategy._loops.loops.loops[0]
        x, y = [x.clone() for x in loop.anchor], [slot.inner.clone() for slot in loop.weights]
        held = [p.detach().clone() for p in pl_module.parameters()]
        torch.save([x, y, held], self.folder / f"{trainer.global_rank}.pt")


class Changes(L.Callback):
    """Give the module other weights at the end of the first epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.fill_(0.25)


def test_weights_given_at_the_end_of_an_epoch_are_where_all_replicas_go_on(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(le.elastic_sgd(8, 0.0)), 2, callbacks=[Changes()], max_epochs=2)
    module = Net()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.25)
    for rank in ranks:
        for y in rank["iterates"][8]:
            assert (y - 0.25).abs().max() < 0.5
        assert (rank["iterates"][8][1] - 0.25).abs().max() < 0.1


class Refreshed(L.Callback):
    """BatchNorm statistics at the end of validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
        record.extra.setdefault("refreshed", []).append([b.clone() for b in pl_module.buffers()])
        record.extra.setdefault("held", []).append([p.detach().clone() for p in pl_module.parameters()])


def test_batchnorm_is_refreshed_at_the_consensus(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    callbacks: list[L.Callback] = [le.RefreshBatchNorm(8), Refreshed(), keep]
    make: Any = lambda: Net(bn=True)  # noqa: E731
    ranks = fit(tmp_path, strategy(PARLE), 2, make=make, callbacks=callbacks, limit_val_batches=2)
    for epoch in range(2):
        by_hand = Net(bn=True)
        with torch.no_grad():
            for p, x in zip(by_hand.parameters(), ranks[0]["held"][epoch], strict=True):
                p.copy_(x)
        layer: Any = by_hand.net[1]
        layer.momentum = None
        by_hand(Samples().inputs)  # a plain average over the whole set, in one batch
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        for rank in ranks:
            refreshed = rank["refreshed"][epoch]
            torch.testing.assert_close(refreshed[0], layer.running_mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(refreshed[0], saved["net.1.running_mean"], rtol=0, atol=0)


class Spoils(L.Callback):
    """Put nan somewhere on one rank in the middle of a loop, and see what every rank validates with."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder, self.where = folder, where
        self.held: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            with torch.no_grad():
                (pl_module.net[0].weight if self.where == "weight" else pl_module.net[1].running_mean).fill_(torch.nan)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.held.append([v.clone() for v in pl_module.state_dict().values()])

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.save(self.held, self.folder / f"held.{trainer.global_rank}.pt")


@pytest.mark.parametrize("where", ["weight", "buffer"])
@pytest.mark.parametrize("relaxation", [le.parle(12, 0.1, 0.3, 0.25), le.diloco(12), le.elastic_sgd(12)])
@pytest.mark.parametrize("data_parallel", [1, 2])
def test_what_is_not_finite_is_never_validated_and_is_mended(
    tmp_path: Path, where: str, relaxation: le.Relaxation, data_parallel: int
) -> None:
    """Found by a validation in the middle of a loop, before any exchange of weights is due."""
    n = 2 * data_parallel

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        own = strategy(relaxation, start_method="popen", replicas=2, broadcast_buffers=False)
        callbacks = [Spoils(tmp_path, where), Record(tmp_path)]
        run = trainer(tmp_path, own, n, callbacks=callbacks, max_epochs=4, val_check_interval=4, limit_val_batches=1)
        run.fit(Net(bn=True, samples=64 * data_parallel))

    assert external(n, work) == [""] * n
    for rank in range(n):
        held = torch.load(tmp_path / f"held.{rank}.pt")
        assert len(held) == 8
        assert all(v.isfinite().all() for values in held for v in values)
        iterates = torch.load(tmp_path / f"{rank}.pt", weights_only=False)["iterates"]
        assert all(y.isfinite().all() for y in iterates[-1])
