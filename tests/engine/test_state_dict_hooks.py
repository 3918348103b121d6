"""A module's state dict holds x and takes x: of all of it, of a part, of one that has come since, and of copies."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.state_dict_hooks import StateDictHooks
from tests.engine.training import assert_equal, values


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("count", torch.tensor([7.0]))


class Outer(torch.nn.Module):
    """One parameter of its own, a part that is tracked and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.tensor([3.0]))
        self.part = Inner()
        self.apart = Inner()


class Source:
    """x is minus what the parameters hold; all but ``apart`` have one."""

    def __init__(self, module: Outer) -> None:
        self.anchors = {p: -p.detach() for p in (module.own, module.part.weight)}
        self.depth = 0
        self.log: list[str] = []

    def begin_loading(self) -> None:
        self.depth += 1
        self.log.append("show")

    def end_loading(self) -> None:
        self.depth -= 1
        self.log.append("hide")

    def tracks(self, p: Tensor) -> bool:
        return p in self.anchors

    def anchor_of(self, p: Tensor) -> Tensor | None:
        return None if self.depth else self.anchors.get(p)


Hooked = tuple[Outer, Source, StateDictHooks]


@pytest.fixture
def hooked() -> Hooked:
    module = Outer()
    source = Source(module)
    return module, source, StateDictHooks(module, source)


def test_a_state_dict_holds_x_and_what_has_none_as_it_is(hooked: Hooked) -> None:
    module, source, _ = hooked
    state = {key: value.tolist() for key, value in module.state_dict().items()}
    assert state == {
        "own": [-3], "part.weight": [-1, -2], "part.count": [7], "apart.weight": [1, 2], "apart.count": [7],
    }  # fmt: skip
    assert module.own.item() == 3
    assert module.part.state_dict(prefix="a.")["a.weight"].tolist() == [-1, -2]
    source.begin_loading()
    assert module.state_dict()["own"].item() == 3
    assert list(module.state_dict()) == list(Outer().state_dict())


def test_whoever_asks_for_the_parameters_gets_them(hooked: Hooked) -> None:
    module, _, _ = hooked
    assert module.state_dict(keep_vars=True)["own"] is module.own


def test_an_anchor_of_more_precision_comes_in_the_parameters(hooked: Hooked) -> None:
    module, source, _ = hooked
    source.anchors[module.own] = torch.tensor([0.1], dtype=torch.float64)
    assert module.state_dict()["own"].dtype == torch.float32


def test_a_shared_parameter_is_x_under_both_its_names(hooked: Hooked) -> None:
    module, _, _ = hooked
    module.again = module.own
    assert module.state_dict()["again"].item() == module.state_dict()["own"].item() == -3


def test_a_part_that_has_come_since_gets_the_hooks(hooked: Hooked) -> None:
    module, source, _ = hooked
    module.late = Inner()
    source.anchors[module.late.weight] = torch.tensor([8.0, 9.0])
    assert module.state_dict()["late.weight"].tolist() == [8, 9]
    assert module.late.state_dict()["weight"].tolist() == [8, 9]
    module.state_dict()
    source.log.clear()
    module.late.load_state_dict(Inner().state_dict())
    assert source.log == ["show", "hide"]  # once, however often a state dict was made


def test_x_is_shown_while_weights_are_loaded(hooked: Hooked) -> None:
    module, source, _ = hooked
    module.load_state_dict(Outer().state_dict())
    assert source.log == ["show", "show", "hide", "hide"]  # the whole, and within it the part
    assert source.depth == 0
    source.log.clear()
    module.apart.load_state_dict(Inner().state_dict())
    assert source.log == []
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(Outer().state_dict() | {"own": torch.ones(3)})
    assert source.depth == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_the_module_is_a_plain_one(hooked: Hooked, copied: object) -> None:
    module, source, _ = hooked
    twin = copied(module)  # type: ignore[operator]
    assert twin.state_dict()["own"].item() == 3
    twin.load_state_dict(Outer().state_dict())
    assert source.log == []
    assert module.state_dict()["own"].item() == -3


def test_remove_leaves_no_hook(hooked: Hooked) -> None:
    module, source, hooks = hooked
    module.late = Inner()
    module.state_dict()
    hooks.remove()
    hooks.remove()
    for m in module.modules():
        assert not m._state_dict_hooks
        assert not m._state_dict_pre_hooks
        assert not m._load_state_dict_pre_hooks
        assert not m._load_state_dict_post_hooks
    module.load_state_dict(module.state_dict())
    assert module.own.item() == 3
    assert source.log == []


def test_the_hooks_keep_nothing_alive() -> None:
    module = Outer()
    source = Source(module)
    hooks = StateDictHooks(module, source)
    del source
    gc.collect()
    assert module.state_dict()["own"].item() == 3
    module.load_state_dict(module.state_dict())
    hooks.install()
    del module
    gc.collect()
    hooks.install()


def test_with_a_loop_what_is_loaded_is_the_new_x_and_the_rest_keeps_its_y() -> None:
    module = Outer()
    optimizer = torch.optim.SGD([module.own, module.part.weight], lr=1.0)
    loop = le.relax(optimizer, le.lookahead(5))
    source = Loop(loop)
    hooks = StateDictHooks(module, source)
    module.own.grad, module.part.weight.grad = torch.ones(1), torch.ones(2)
    optimizer.step()
    assert module.own.item() == 2
    assert module.state_dict()["own"].item() == 3
    module.load_state_dict({"part.weight": torch.tensor([5.0, 6.0])}, strict=False)
    assert_equal(values(loop.anchor), [torch.tensor([3.0]), torch.tensor([5.0, 6.0])])
    assert (module.own.item(), module.part.weight.tolist()) == (2, [5, 6])
    hooks.remove()


class Loop:
    """A loop as an anchor source."""

    def __init__(self, loop: le.InnerOuter) -> None:
        self.begin_loading, self.end_loading, self.anchor_of = loop.show, loop.hide, loop.weights.anchor_of
        self.tracks = loop.weights.__contains__
