"""What a kernel is given: looked at in full where anything has changed, and never out of date."""

import copy
import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.native import step
from lightning_entropy.engine.native.rows import Noise, Numbers, Places, Tables, Tensors, Update

NUMBERS = Numbers(Update(0.1), 0.5, Noise())


class Recorder:
    """A kernel that keeps what it is given."""

    def __init__(self, devices: Any = ()) -> None:
        self.given: list[Any] = []

    def run(
        self, device: torch.device, places: Places, gradients: Sequence[int], numbers: Sequence[Numbers], average: float
    ) -> None:
        self.given.append((device, places, list(gradients), list(numbers), average))


def parameters() -> list[Tensors]:
    """With and without a running mean, a momentum and a gradient."""
    made = []
    for i, shape in enumerate([(3, 4), (5,), (), (2, 6, 3, 3), (0, 2)]):
        y = torch.nn.Parameter(torch.randn(shape))
        others = [torch.randn(shape) for _ in range(4)]
        made.append(Tensors(y, others[0], *(t if i % 2 else None for t in others[1:3]), others[3]))
    return made


META = torch.empty(3, 4, device="meta")
Change = Callable[[list[Tensors]], Any]


def replace(tensors: list[Tensors], i: int, **new: Tensor | None) -> None:
    tensors[i] = tensors[i]._replace(**new)


def resize(t: Tensor) -> None:
    t.data = torch.randn(t.numel() + 7)


CHANGES: dict[str, Change] = {
    "another parameter": lambda ts: replace(ts, 0, y=torch.nn.Parameter(torch.randn(3, 4))),
    "other numbers in it": lambda ts: setattr(ts[0].y, "data", torch.randn(3, 4)),
    "another size": lambda ts: resize(ts[1].y),
    "another size of all": lambda ts: [resize(t) for t in ts[1] if t is not None],
    "less of it in its place": lambda ts: setattr(ts[3].y, "data", ts[3].y.data[:1]),
    "another order in its place": lambda ts: setattr(ts[0].y, "data", ts[0].y.data.as_strided((3, 4), (1, 3))),
    "another order of the momentum": lambda ts: ts[3].momentum.as_strided_((2, 6, 3, 3), (54, 1, 18, 6)),  # type: ignore[union-attr]
    "another x": lambda ts: replace(ts, 1, x=torch.randn(5)),
    "x elsewhere": lambda ts: setattr(ts[1].x, "data", torch.randn(5)),
    "a mean that begins": lambda ts: replace(ts, 0, z=torch.randn(3, 4)),
    "a mean that ends": lambda ts: replace(ts, 1, z=None),
    "a mean that becomes another's momentum": lambda ts: [replace(ts, 0, momentum=ts[3].z), replace(ts, 3, z=None)],
    "half the precision": lambda ts: setattr(ts[1].y, "data", ts[1].y.data.half()),
    "a wide gradient": lambda ts: replace(ts, 0, gradient=torch.randn(3, 4, dtype=torch.float64)),
    "a gradient in another order": lambda ts: replace(ts, 0, gradient=torch.randn(4, 3).T),
    "no gradient": lambda ts: replace(ts, 0, gradient=None),
    "a gradient of no numbers": lambda ts: replace(ts, 1, gradient=torch._efficientzerotensor((5,))),
    "a negative view": lambda ts: replace(ts, 1, gradient=torch._neg_view(torch.randn(5))),
    "a sparse gradient": lambda ts: replace(ts, 0, gradient=torch.eye(3, 4).to_sparse()),
    "a class of its own": lambda ts: replace(ts, 1, y=ts[1].y.as_subclass(type("Own", (Tensor,), {}))),
    "on another device": lambda ts: replace(
        ts, 0, **{n: torch.empty(3, 4, device="meta") for n in ("y", "x", "gradient")}
    ),
    "a group that comes": lambda ts: ts.append(Tensors(torch.randn(9), torch.randn(9))),
    "a group that goes": lambda ts: ts.pop(),
    "another order of them": lambda ts: ts.reverse(),
    "one twice": lambda ts: ts.append(ts[0]),
}


def run(tables: Tables, kernel: Recorder, tensors: list[Tensors]) -> Any:
    kernel.given.clear()
    return tables.run(tensors, [NUMBERS] * len(tensors), 0.75), list(kernel.given)


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_seen(name: str) -> None:
    """As by tables that have seen nothing before."""
    kernel = Recorder()
    tables, tensors = Tables({"cpu": kernel}), parameters()
    before = run(tables, kernel, tensors)
    assert before[0] == [0, 1, 2, 3, 4]
    assert run(tables, kernel, tensors) == before and tables.built == 1
    CHANGES[name](tensors)
    after = run(tables, kernel, tensors)
    assert after == run(Tables({"cpu": kernel}), kernel, tensors)
    assert (after != before or name == "one twice") and tables.built == 2


def test_new_gradients_and_numbers_are_no_change() -> None:
    kernel = Recorder()
    tables, tensors = Tables({"cpu": kernel}), parameters()
    kept = []
    for i in range(5):
        tensors = [t._replace(gradient=torch.randn(t.y.shape)) for t in tensors]
        kept.append(tensors)  # or else the next would be in the same place
        numbers = [Numbers(Update(0.1 * i), 0.1 * i, Noise(0.1, (i, j), j)) for j in range(len(tensors))]
        kernel.given.clear()
        assert tables.run(tensors, numbers, 0.1 * i) == [0, 1, 2, 3, 4]
        ((_, places, gradients, given, average),) = kernel.given
        assert gradients == [t.gradient.data_ptr() for t in tensors if t.gradient is not None]
        assert [row[0] for row in places.addresses] == [t.y.data_ptr() for t in tensors]
        assert given == numbers and average == 0.1 * i
    assert tables.built == 1


def test_a_few_lists_take_turns() -> None:
    kernel = Recorder()
    tables, lists = Tables({"cpu": kernel}), [parameters() for _ in range(Tables.LAST)]
    for _ in range(3):
        for tensors in lists:
            run(tables, kernel, tensors)
    assert tables.built == len(lists)


def test_the_parameters_that_move_have_new_versions() -> None:
    kernel, tensors = Recorder(), parameters()
    before = [t.y._version for t in tensors]
    tables = Tables({"cpu": kernel})
    replace(tensors, 1, gradient=torch.randn(5, dtype=torch.float64))
    for _ in range(2):
        run(tables, kernel, tensors)
    assert [t.y._version - v for t, v in zip(tensors, before, strict=True)] == [2, 0, 2, 2, 2]


def test_they_can_be_copied_and_pickled() -> None:
    kernel = Recorder()
    tables, tensors = Tables({"cpu": kernel}), parameters()
    run(tables, kernel, tensors)
    for again in (copy.deepcopy(tables), pickle.loads(pickle.dumps(tables))):
        run(again, kernel, tensors)
        assert again.built == 1


@pytest.mark.parametrize("make", [functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("width", [0.0, 0.1])
def test_a_training_looks_at_its_parameters_once(monkeypatch: pytest.MonkeyPatch, make: Any, width: float) -> None:
    """SGD's first step makes its momentum; a perturbation has its own list; and a loop that begins may allocate z."""
    monkeypatch.setattr(step, "KERNELS", {"cpu": Recorder})
    params = [torch.nn.Parameter(torch.randn(n, 3)) for n in range(1, 20)]
    optimizer = make(params)
    relaxation = le.Relaxation(inner_steps=5, gamma=0.5, noise=1e-3, average=0.75, width=width)
    loop = le.relax(optimizer, relaxation, seed=0, compile=True)
    native = loop._inner[-1]._native  # type: ignore[attr-defined]
    built = []
    for i in range(20):
        loop.prepare()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (i + 1)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        built.append(native._tables.built)
    assert built[9] == built[-1] <= 4
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(3))]})
    loop.prepare()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    loop.prepare()
    assert native._tables.built > built[-1] or not width
