"""A checkpoint whose part of ours is damaged, or is of something else, is refused in one line, and half of it is not
loaded."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

import lightning_entropy as le
from tests.lightning_modules import LIGHTNING_WARNINGS, Automatic, Pair, Stream, same, trainer, weights

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]
WAY_OUT = "Resume from another checkpoint, or go on from this one's weights alone: load_from_checkpoint"


def callback(**kwargs: Any) -> le.EntropySGD:
    return le.EntropySGD(5, 0.5, 0.01, seed=3, outer_momentum=0.5, **kwargs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    t = trainer(tmp_path, callbacks=[callback()], max_steps=16)
    t.fit(Pair(), Stream())  # eight outer steps and more of both optimizers
    t.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content["callbacks"])
    torch.save(content, path.with_name("changed.ckpt"))
    return path.with_name("changed.ckpt")


def loops(states: dict[str, Any]) -> Any:
    return states["EntropySGD"]["loops"]


def rename(states: dict[str, Any]) -> None:
    slots = loops(states)[1]["slots"]
    slots["another"] = slots.pop(next(iter(slots)))


def reshape(states: dict[str, Any]) -> None:
    slot = next(iter(loops(states)[1]["slots"].values()))
    slot["inner"] = torch.ones(5, 5)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda s: s.update(EntropySGD={}), r"must have loops, a list, got the keys \[\]"),
    "none": (lambda s: s.update(EntropySGD=None), "must be a dict, got None"),
    "no dict": (lambda s: s.update(EntropySGD=[1]), r"must be a dict, got \[1\]"),
    "no loops": (lambda s: s["EntropySGD"].pop("loops"), "must have loops, a list, got the keys"),
    "loops": (lambda s: s["EntropySGD"].update(loops=3), "loops in .* must be a list, got 3"),
    "method": (lambda s: s["EntropySGD"].update(method="heat"), "method in .* must be a dict with perturb, a bool"),
    "optimizers": (lambda s: s["EntropySGD"].update(optimizers=[1]), "optimizers in .* must be a list of class names"),
    "loop": (lambda s: loops(s).__setitem__(1, None), r"loops\[1\] in .* must be a dict, got None"),
    "newer": (lambda s: s["EntropySGD"].update(format=7), "must be of format 1 or older, got format 7"),
    "newer loop": (lambda s: loops(s)[1].update(format=7), r"loops\[1\] in .* of format 2 or older, got format 7"),
    "missing": (lambda s: loops(s)[1].pop("seed"), r"loops\[1\] in .* must have seed, an int >= 0, got the keys"),
    "type": (lambda s: loops(s)[1].update(inner_step="1"), r"inner_step in loops\[1\] in .* an int >= 0, got '1'"),
    "name": (rename, r"slots in loops\[1\] in .* must be of the parameters .*, got 'another', which is not one"),
    "shape": (reshape, r"inner of slots\['critic.* in loops\[1\] in .* the parameter's shape, .*, got \(5, 5\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_state_is_refused_before_anything_else_is_loaded(saved: Path, change: str) -> None:
    damage, message = CHANGES[change]
    keep = ModelCheckpoint(saved.parent / "new", save_on_exception=True)
    module = Pair()
    t = trainer(saved.parent, callbacks=[callback(), keep], enable_checkpointing=True, max_epochs=2)
    with pytest.raises(ValueError, match=message) as error:
        t.fit(module, Stream(), ckpt_path=changed(saved, damage))
    assert "the state of EntropySGD in a checkpoint" in str(error.value)
    assert WAY_OUT in str(error.value)
    assert all(not optimizer.state for optimizer in t.optimizers)
    assert t.global_step == 0
    assert not list((saved.parent / "new").glob("*"))


def test_the_refused_checkpoints_weights_can_be_had(saved: Path) -> None:
    """The way out that the message names: Lightning loads the weights, and looks at no state of ours."""
    path = changed(saved, CHANGES["type"][0])
    module = Pair.load_from_checkpoint(path, weights_only=True)
    assert same(list(module.state_dict().values()), list(torch.load(path)["state_dict"].values()))


def test_going_back_in_the_middle_of_a_fit_is_all_or_nothing() -> None:
    """As a tuner does it: the second loop's state is refused, and the first has not moved."""
    ours = callback()
    seen: list[Any] = []

    def on_train_batch_start(t: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            seen.append(copy.deepcopy(ours.state_dict()))
        if batch_idx == 7:
            bad = copy.deepcopy(seen[0])
            bad["loops"][1]["slots"]["another"] = {}
            before = weights(module), copy.deepcopy(ours.state_dict()["loops"])
            with pytest.raises(ValueError, match=re.escape("must be of the parameters ['critic.weight'")):
                ours.load_state_dict(bad)
            after = weights(module), ours.state_dict()["loops"]
            seen.append((before, after))

    trainer(callbacks=[ours, LambdaCallback(on_train_batch_start=on_train_batch_start)]).fit(Pair(), Stream())
    (before, loops_before), (after, loops_after) = seen[1]
    assert same(before, after)
    assert [loop["inner_step"] for loop in loops_before] == [loop["inner_step"] for loop in loops_after]


def test_another_outer_optimizer_is_refused(saved: Path) -> None:
    """Its state has other keys, which would end in a KeyError at the first outer step."""
    other = le.EntropySGD(5, 0.5, 0.01, seed=3, outer=torch.optim.Adam)
    with pytest.raises(ValueError, match=r"outer in loops\[0\] in .* must be of an optimizer with options .*'betas'"):
        trainer(callbacks=[other], max_epochs=2).fit(Pair(), Stream(), ckpt_path=saved)


def test_an_outer_optimizer_that_is_gone_is_said(tmp_path: Path) -> None:
    t = trainer(callbacks=[le.EntropySGD(5, 0.5, outer=torch.optim.Adam)], max_steps=7)
    t.fit(Automatic(), Stream())
    t.save_checkpoint(tmp_path / "adam.ckpt")
    with pytest.warns(UserWarning, match=r"of another method: outer was torch.optim.adam.Adam, is None. It goes on"):
        trainer(callbacks=[le.EntropySGD(5, 0.5)], max_epochs=2).fit(
            Automatic(), Stream(), ckpt_path=tmp_path / "adam.ckpt"
        )
