"""A replica's state resumes exactly from its own file, and never from a wrong one."""

import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_entropy as le
from tests.strategies.runs import FORK_WARNINGS, Net, external, fit, strategy, trainer
from tests.strategies.streams import Loading, Streaming, Two

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


SHORT: dict[str, Any] = {"max_steps": 9, "max_epochs": -1}

PARLE = le.parle(3, le.Scoping(0.1, 0.2), le.Scoping(0.2, 0.2), 0.25)

METHODS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "parle": (PARLE, {}, Streaming),
    "momentum outside": (le.parle(3, 0.1, 0.3, outer_lr=0.5, outer_momentum=0.9), {}, partial(Streaming, bn=True)),
    "average": (le.parle(3, 0.1, 0.3, elastic_target="average"), {}, Streaming),
    "diloco": (le.diloco(3), {}, Streaming),
    "noise": (le.entropy_sgd(3, le.Pull(0.5), 1e-2), {}, Streaming),
    "not reset": (le.Relaxation(inner_steps=3, gamma=0.3, reset=False, rho=0.3, outer_lr=0.5), {}, Streaming),
    "bfloat16": (PARLE, {"communication_dtype": "bfloat16"}, Streaming),
    "int8 blocking": (PARLE, {"communication_dtype": "int8", "overlap": False}, Streaming),
    "int8": (PARLE, {"communication_dtype": "int8"}, Streaming),
    "int4": (PARLE, {"communication_dtype": "int4"}, Streaming),
    "int4 diloco": (le.diloco(3), {"communication_dtype": "int4"}, Streaming),
    "streaming": (le.streaming_diloco(4, 2, 3), {}, Streaming),
    "streaming int8": (le.streaming_diloco(4, 2, 3), {"communication_dtype": "int8"}, Streaming),
    "streaming int4 blocking": (
        le.streaming_diloco(4, 3, 2, 0.0),
        {"communication_dtype": "int4", "overlap": False},
        Streaming,
    ),
    "streaming two optimizers": (le.streaming_diloco(3, 2, 2), {}, Two),
    "int8 average": (le.parle(3, 0.1, 0.3, elastic_target="average"), {"communication_dtype": "int8"}, Streaming),
    "apart": (PARLE, {"independent_init": True}, Streaming),
    "dropout": (PARLE, {}, partial(Loading, dropout=0.3)),
    "two optimizers": (PARLE, {}, Two),
}


def assert_goes_on(whole: list[dict[str, Any]], again: list[dict[str, Any]], steps: int) -> None:
    """The resumed run made the last ``steps`` of the whole one, bit for bit."""
    for left, right in zip(whole, again, strict=True):
        assert len(right["iterates"]) == steps
        for before, after in zip(left["iterates"][-steps:], right["iterates"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(torch.equal(v, right["final"][k]) for k, v in left["final"].items())


@pytest.mark.processes
@pytest.mark.parametrize(("name", "n"), [*((name, 2) for name in METHODS), ("parle", 3), ("int8", 3)])
def test_resume_in_the_middle_of_an_inner_loop_and_of_an_epoch(tmp_path: Path, name: str, n: int) -> None:
    relaxation, kwargs, make = METHODS[name]
    two = name.endswith("two optimizers")
    every = 6 if two else 5  # global steps: there are three in two batches with two optimizers
    keep = ModelCheckpoint(tmp_path / "whole", "{step}", every_n_train_steps=every, save_top_k=-1)
    settings: dict[str, Any] = {"make": make, "use_distributed_sampler": False}
    whole = fit(tmp_path / "whole", strategy(relaxation, **kwargs), n, callbacks=[keep], **settings)
    file = tmp_path / "whole" / f"step={every}.ckpt"
    again = fit(tmp_path / "again", strategy(relaxation, **kwargs), n, ckpt_path=file, **settings)
    assert_goes_on(whole, again, 12 if two else 11)


@pytest.mark.processes
@pytest.mark.parametrize("at", ["epoch", "validation"])
def test_resume_at_the_end_of_an_epoch(tmp_path: Path, at: str) -> None:
    """With Lightning's own sampler; saved by the epoch, with dropout, or by its validation."""
    keep = ModelCheckpoint(tmp_path / "whole", "{epoch}", save_top_k=-1, save_on_train_epoch_end=at == "epoch")
    # Lightning makes the validation loader's iterator again, which draws a number that dropout would have drawn.
    make = partial(Net, dropout=0.3 if at == "epoch" else 0.0, bn=True)
    kwargs: dict[str, Any] = {"make": make, "max_epochs": 3}
    kwargs["limit_val_batches"] = 0 if at == "epoch" else 2
    whole = fit(tmp_path / "whole", strategy(PARLE), 2, callbacks=[keep], **kwargs)
    again = fit(tmp_path / "again", strategy(PARLE), 2, ckpt_path=tmp_path / "whole" / "epoch=0.ckpt", **kwargs)
    assert_goes_on(whole, again, 16)


class Doubles(L.Callback):
    """Change a weight and a buffer while the consensus is shown."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            with torch.no_grad():
                pl_module.net[0].weight.mul_(2)
                pl_module.net[1].running_mean.add_(1)


@pytest.mark.processes
def test_what_is_changed_while_the_consensus_is_shown_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Weights too, where no mean of the old ones is under way."""
    relaxation = le.diloco(3)
    keep = ModelCheckpoint(tmp_path / "whole", "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    kwargs: dict[str, Any] = {"make": partial(Net, bn=True), "max_epochs": 3, "limit_val_batches": 2}
    whole = fit(tmp_path / "whole", strategy(relaxation), 2, callbacks=[Doubles(), keep], **kwargs)
    file = tmp_path / "whole" / "epoch=0.ckpt"
    assert_goes_on(whole, fit(tmp_path / "again", strategy(relaxation), 2, ckpt_path=file, **kwargs), 16)


class LocalStatistics(Streaming):
    """BatchNorm layers whose statistics the ranks of a replica do not share."""

    def __init__(self) -> None:
        super().__init__(bn=True)


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize(("format", "at"), [("float32", 5), ("bfloat16", 5), ("int8", 5), ("int8", 6), ("int4", 6)])
def test_resume_of_groups(tmp_path: Path, format: Any, at: int) -> None:
    """Also of what the ranks of a replica do not share: what rounding left over, and BatchNorm statistics.

    In the middle of a loop of three, with its exchange under way, and between two loops.
    """
    own = {"replicas": 2, "communication_dtype": format, "broadcast_buffers": False}
    keep = ModelCheckpoint(tmp_path, "at", every_n_train_steps=at, save_top_k=1)
    whole = fit(tmp_path, strategy(PARLE, **own), 4, make=LocalStatistics, callbacks=[keep], **SHORT)
    assert sorted(os.listdir(tmp_path / "at.ckpt.replicas")) == ["0-1.pt", "0.pt", "1-1.pt", "1.pt"]
    kwargs: dict[str, Any] = {"make": LocalStatistics, "ckpt_path": tmp_path / "at.ckpt", **SHORT}
    assert_goes_on(whole, fit(tmp_path / "again", strategy(PARLE, **own), 4, **kwargs), 9 - at)


@pytest.mark.processes
def test_groups_of_another_size_begin_without_what_rounding_has_left_over_and_say_so(tmp_path: Path) -> None:
    own = {"replicas": 2, "communication_dtype": "bfloat16"}
    keep = ModelCheckpoint(tmp_path, "at", every_n_train_steps=5, save_top_k=1)
    fit(tmp_path, strategy(PARLE, **own), 4, make=Streaming, callbacks=[keep], **SHORT)
    kwargs: dict[str, Any] = {"make": Streaming, "ckpt_path": tmp_path / "at.ckpt", **SHORT}
    # Warnings are errors here, in the children too.
    with pytest.raises(Exception, match=r"at.ckpt cannot be divided anew .* the next exchange begins without it"):
        fit(tmp_path / "fewer", strategy(PARLE, **own), 2, **kwargs)
    kwargs["callbacks"] = [Quiet()]
    assert len(fit(tmp_path / "fewer", strategy(PARLE, **own), 2, **kwargs)[0]["iterates"]) == 4


class Quiet(L.Callback):
    """Says nothing, in the children."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        warnings.simplefilter("ignore")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two replicas after 7 of 16 steps."""
    folder = tmp_path_factory.mktemp("saved")
    keep = ModelCheckpoint(folder, "at", every_n_train_steps=7)
    fit(folder, strategy(PARLE), 2, make=Streaming, callbacks=[keep], max_steps=7)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for f in saved.glob("at.ckpt*"):
        (shutil.copytree if f.is_dir() else shutil.copy)(f, tmp_path / f.name)
    return tmp_path / "at.ckpt"


def go_on(copy: Path, n: int = 2) -> list[dict[str, Any]]:
    return fit(copy.parent / "again", strategy(PARLE), n, make=Streaming, ckpt_path=copy, **SHORT)


def consensus(copy: Path) -> list[Tensor]:
    return list(torch.load(copy, weights_only=True)["state_dict"].values())


class Start(L.Callback):
    """Keep x and t as the first batch finds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        path = self.folder / f"start.{trainer.global_rank}.pt"
        if not path.exists():
            strategy: Any = trainer.strategy
            loop = strategy._loops.loops.loops[0]
            torch.save(([x.clone() for x in loop.anchor], loop.outer_step), path)


@pytest.mark.processes
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.filterwarnings("ignore:.*has 2 replicas")
def test_another_number_of_replicas_starts_from_the_consensus(copy: Path, n: int) -> None:
    start = Start(copy.parent)
    fit(copy.parent / "again", strategy(PARLE), n, make=Streaming, callbacks=[start], ckpt_path=copy, **SHORT)
    for rank in range(n):
        x, t = torch.load(copy.parent / f"start.{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(x, consensus(copy), strict=True))
        assert t == 2


@pytest.mark.processes
def test_another_number_of_replicas_is_said(copy: Path) -> None:
    # Warnings are errors here, in the children too.
    with pytest.raises(Exception, match=r"at.ckpt has 2 replicas, and there are 1: .* from the consensus"):
        go_on(copy, 1)


@pytest.mark.processes
def test_a_missing_file_is_named_and_all_start_from_the_consensus(copy: Path) -> None:
    os.remove(f"{copy}.replicas/1.pt")
    with pytest.raises(Exception, match=r"at.ckpt.replicas/1.pt, of one of 2 replicas, is missing: .* consensus"):
        go_on(copy)

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        start = Start(copy.parent)
        run = trainer(copy.parent, strategy(PARLE, start_method="popen"), 2, callbacks=[start], **SHORT)
        run.fit(Streaming(), ckpt_path=copy)

    assert external(2, work) == ["", ""]
    for rank in range(2):
        x, _ = torch.load(copy.parent / f"start.{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(x, consensus(copy), strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("damage", ["half", "empty", "another", "pickle", "swapped"])
def test_a_wrong_file_is_an_error_that_names_it(copy: Path, damage: str) -> None:
    path = Path(f"{copy}.replicas/1.pt")
    content = path.read_bytes()
    if damage in ("half", "empty"):
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    elif damage == "another":
        other = torch.load(path, weights_only=True)
        torch.save({**other, "token": "another"}, path)
    elif damage == "swapped":
        other_path = Path(f"{copy}.replicas/0.pt")
        path.write_bytes(other_path.read_bytes())
        other_path.write_bytes(content)
    else:
        torch.save({"token": path}, path)  # a Path is not weights_only-safe
    with pytest.raises(Exception, match=r"ReplicaFileError: .*at.ckpt.replicas/1.pt"):
        go_on(copy)


def saved_alone(copy: Path, replica: int, step: int) -> None:
    """Put beside a checkpoint what a rank leaves there that saves alone, after an exception."""
    path = Path(f"{copy}.replicas/{replica}.pt")
    run, number, _ = torch.load(copy, weights_only=True)["elastic_replicas"]["token"].split("-")
    token = f"{run}-{int(number) + 1}-{step}"
    content = torch.load(path, weights_only=True)
    content["checkpoint"]["global_step"] = step
    torch.save({**content, "token": token}, path.with_name(f"{replica}.{token}.part"))
    if replica == 0:
        main = torch.load(copy, weights_only=True)
        main["elastic_replicas"]["token"] = token
        torch.save(main, copy)


@pytest.mark.processes
def test_files_of_different_steps_are_not_used_and_the_last_complete_set_is_found(copy: Path) -> None:
    expected = go_on(copy)
    saved_alone(copy, 1, 32)
    saved_alone(copy, 0, 40)
    with pytest.raises(Exception, match=r"not complete: .*/1.pt, .* is missing: .* the last complete save, at step 7"):
        go_on(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for left, right in zip(expected, go_on(copy), strict=True):
            assert all(torch.equal(v, right["final"][k]) for k, v in left["final"].items())
    for replica in range(2):
        os.remove(f"{copy}.replicas/{replica}.pt")
    with pytest.raises(Exception, match=r"not complete: .*/1.pt, .* is missing: all of them start from the consensus"):
        go_on(copy)


@pytest.mark.processes
def test_files_that_ranks_saved_alone_at_the_same_step_are_a_set(copy: Path) -> None:
    for replica in (1, 0):
        saved_alone(copy, replica, 7)
        os.remove(f"{copy}.replicas/{replica}.pt")
    go_on(copy)


@pytest.mark.processes
def test_a_surplus_file_is_said_and_not_read(copy: Path) -> None:
    shutil.copy(f"{copy}.replicas/1.pt", f"{copy}.replicas/2.pt")
    with pytest.raises(Exception, match=r"2.pt belongs to none of the 2 replicas"):
        go_on(copy)


@pytest.mark.processes
def test_a_link_is_followed(copy: Path) -> None:
    link = copy.parent / "last.ckpt"
    link.symlink_to(copy)
    straight = go_on(copy)
    linked = fit(copy.parent / "linked", strategy(PARLE), 2, make=Streaming, ckpt_path=link, **SHORT)
    for left, right in zip(straight, linked, strict=True):
        assert all(torch.equal(v, right["final"][k]) for k, v in left["final"].items())


@pytest.mark.processes
def test_saving_after_fit_can_be_resumed(tmp_path: Path) -> None:
    """By Trainer.save_checkpoint, in the processes that trained."""

    def work(rank: int) -> None:
        run = trainer(tmp_path, strategy(PARLE, start_method="popen"), 2, max_steps=7, max_epochs=-1)
        run.fit(Streaming())
        run.save_checkpoint(tmp_path / "at.ckpt")

    assert external(2, work) == ["", ""]
    again = go_on(tmp_path / "at.ckpt")
    whole = fit(tmp_path / "whole", strategy(PARLE), 2, make=Streaming, **SHORT)
    for left, right in zip(whole, again, strict=True):
        assert all(torch.equal(v, right["final"][k]) for k, v in left["final"].items())


@pytest.mark.processes
def test_the_main_file_loads_without_us(tmp_path: Path) -> None:
    fit(tmp_path, strategy(PARLE), 2, callbacks=[ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    module = Net()
    run = trainer(tmp_path / "plain", "auto", 1, max_epochs=2)
    run.fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 16
    assert Net.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu") is not None


@pytest.mark.processes
def test_a_checkpoint_is_removed_whole(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=1, save_last=True)
    fit(tmp_path, strategy(PARLE), 2, callbacks=[keep])
    assert sorted(f.name for f in tmp_path.glob("*.ckpt*")) == sorted(
        [
            Path(keep.best_model_path).name,
            f"{Path(keep.best_model_path).name}.replicas",
            "last.ckpt",
            "last.ckpt.replicas",
        ]
    )


@pytest.mark.processes
@pytest.mark.parametrize("detached", [False, True])
def test_after_the_fit_the_process_that_started_the_others_can_load(tmp_path: Path, detached: bool) -> None:
    """As with Lightning's own ddp_fork and ddp_spawn; also where the module was let go of."""
    keep = ModelCheckpoint(tmp_path, "at", every_n_train_steps=4)
    run = trainer(tmp_path, strategy(PARLE), 2, callbacks=[keep], max_epochs=1)
    module = Net()
    run.fit(module)
    if detached:
        module.trainer = None
    loaded = run.strategy.load_checkpoint(tmp_path / "at.ckpt", weights_only=True)
    assert loaded["global_step"] == 8
    assert set(loaded["state_dict"]) == set(module.state_dict())


class WithAdam(Streaming):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.processes
def test_another_class_of_optimizer_is_refused_before_its_state_is_loaded(copy: Path) -> None:
    with pytest.raises(Exception, match="optimizer 0 must be SGD to go on from the checkpoint's state, got Adam"):
        fit(copy.parent / "again", strategy(PARLE), 2, make=WithAdam, ckpt_path=copy, **SHORT)


@pytest.mark.processes
def test_whoever_has_started_the_processes_saves_the_result_afterwards(tmp_path: Path) -> None:
    module, t = Net(), trainer(tmp_path, strategy(PARLE), 2, max_steps=4)
    t.fit(module)
    t.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt")["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
