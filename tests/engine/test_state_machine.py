"""Any sequence of what users do to a loop, against a model of x, y and z in NumPy that has no idea of the engine.

``python -m pytest tests/engine/test_state_machine.py --hypothesis-profile=thorough --hypothesis-seed=0`` tries 2,000
sequences of every kind.
"""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.module_loops import ModuleLoops

LR = 0.25
VALUES = st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0])
NAMES = ("a", "part.b", "part.c", "late")
OTHER = {name: float(i) for i, name in enumerate(NAMES, 1)}  # what a second replica has, for ever


class Model:
    """x, y and z by name, as the equations have them. None: z is y."""

    def __init__(self, r: le.Relaxation, values: dict[str, float], replicas: bool) -> None:
        self.r, self.replicas = r, replicas
        self.x, self.y = dict(values), dict(values)
        self.z: dict[str, float | None] = dict.fromkeys(values)
        self.sums: dict[str, float] = {}
        self.tracked, self.moved, self.replaced = set[str](), set[str](), set[str]()
        self.k = self.t = 0
        self.begun = False
        self.target: dict[str, float] | None = None

    def write(self, name: str, value: float) -> None:
        """Into the parameter, in training."""
        self.y[name] = value
        if self.r.perturb or not self.begun or name not in self.tracked:
            self.x[name] = value
            self.z[name] = None if self.z[name] is None else value

    def replace(self, name: str, value: float) -> None:
        """Into x, while it is shown or by loading; the value that is there already is no write."""
        if self.x[name] != value:
            self.x[name] = self.y[name] = value
            if name in self.tracked:
                self.z[name] = None
                self.moved.discard(name)
                self.replaced.add(name)

    def begin(self, names: list[str]) -> None:
        """Replicas track what can be trained, and take the mean of x when a loop begins."""
        if self.replicas:
            self.tracked |= set(names)
            self.begun = True
            if self.target is None and self.r.rho != 0:
                self.target = {n: (self.x[n] + OTHER[n]) / 2 for n in self.tracked}
                self.replaced = set()

    def step(self, gradients: dict[str, float], trainable: list[str]) -> None:
        self.begin(trainable)
        if not gradients:
            return
        self.tracked |= set(gradients)
        if self.r.perturb:
            self.smooth(gradients, trainable)
        else:
            self.descend(gradients)

    def descend(self, gradients: dict[str, float]) -> None:
        self.begun = True
        k = LR * self.r.at(self.t).gamma
        for n, g in gradients.items():
            self.y[n] = (self.y[n] - LR * g + k * self.x[n]) / (1 + k)
            a = self.r.at(self.t).average
            if a != 1:
                z = self.x[n] if self.z[n] is None else self.z[n]
                self.z[n] = z + a * (self.y[n] - z)  # type: ignore[operator]
        self.moved |= set(gradients)
        self.k += 1
        if self.k == self.r.inner_steps:
            self.outer()

    def outer(self) -> None:
        now = self.r.at(self.t)
        for n in list(self.tracked if self.replicas else self.moved):
            last = self.y[n] if n in self.moved or not self.r.reset else self.x[n]  # z starts at x
            z = last if self.z[n] is None else self.z[n]
            step = self.x[n] - z  # type: ignore[operator]
            if self.replicas and self.r.outer_target.common:
                step = (step + OTHER[n]) / 2
            if self.target is not None and n in self.target and n not in self.replaced:
                step += now.rho * (self.x[n] - self.target[n])
            self.x[n] -= now.outer_lr * step
            if self.r.reset:
                self.y[n] = self.x[n]
        self.k, self.t, self.target, self.moved = 0, self.t + 1, None, set()
        if self.r.reset:
            self.begun = False
            for n in self.tracked:
                self.x[n] = self.y[n]
                self.z[n] = None if self.z[n] is None else self.x[n]

    def smooth(self, gradients: dict[str, float], trainable: list[str]) -> None:
        """The heat equation: L gradients are averaged, and x takes one step along their mean."""
        for n, g in gradients.items():
            self.sums[n] = self.sums.get(n, 0.0) + g
        self.k += 1
        if self.k == self.r.inner_steps:
            for n, total in self.sums.items():
                if n in trainable:
                    self.x[n] -= LR * total / self.r.inner_steps
            self.k, self.t, self.sums, self.y = 0, self.t + 1, {}, dict(self.x)


class Net(torch.nn.Module):
    """Four scalars, two of them in a part, one of which the optimizer gets later."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.part = torch.nn.Module()
        self.part.b = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.part.c = torch.nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
        self.late = torch.nn.Parameter(torch.tensor([4.0], dtype=torch.float64))


RELAXATIONS: dict[str, tuple[Callable[[], le.Relaxation], bool]] = {
    "chain": (lambda: le.Relaxation(inner_steps=3, gamma=le.Scoping(1.0, 0.5), average=0.75, outer_lr=0.5), False),
    "last iterate": (lambda: le.hamilton_jacobi(2, 1.0), False),
    "two time scales": (lambda: le.two_timescale(1.0, 0.0, 0.25), False),
    "elastic": (lambda: le.parle(3, 0.5, 0.25), True),
    "common step": (lambda: le.local_sgd(2), True),
    "heat": (lambda: le.heat(1, 100.0), False),
    "mean heat": (lambda: le.heat(3, 100.0), False),
    "perturbed chain": (lambda: le.Relaxation(inner_steps=3, average=0.5, outer_lr=0.5, width=0.125), False),
    "perturbed replicas": (lambda: le.Relaxation(inner_steps=2, rho=0.5, width=0.125), True),
    "offloaded": (lambda: le.Relaxation(inner_steps=2, outer_lr=0.5), False),
    "offloaded replicas": (lambda: le.elastic_sgd(2, 0.5), True),
    "offloaded perturbed": (lambda: le.Relaxation(inner_steps=3, outer_lr=0.5, width=0.125), False),
}


class LoopMachine(RuleBasedStateMachine):
    """One module and its loop; ``kind`` is set by the test."""

    kind = "chain"

    @initialize()
    def start(self) -> None:
        make, self.replicas = RELAXATIONS[self.kind]
        self.relaxation = make()
        self.perturbs = self.relaxation.perturb or self.relaxation.width != 0
        self.net = Net()
        self.parameters = dict(self.net.named_parameters())
        self.depth, self.perturbed, self.noisy = 0, False, set[str]()
        self.optimizer = torch.optim.SGD([self.parameters[n] for n in NAMES[:3]], lr=LR)
        self.attach()

    def attach(self) -> None:
        self.loops = self.make(self.net, self.optimizer)
        values = {n: p.item() for n, p in self.parameters.items()}
        self.model = Model(self.relaxation, values, self.replicas)

    def make(self, net: Net, optimizer: torch.optim.Optimizer) -> ModuleLoops:
        names = {p: n for n, p in net.named_parameters()}

        def mean(tensors: list[Tensor]) -> list[Tensor]:
            order = [names[w.param] for w in loops.loops[0].weights]
            return [(t + OTHER[n]) / 2 for t, n in zip(tensors, order, strict=True)]

        loops = ModuleLoops(
            net,
            [optimizer],
            self.relaxation,
            replica_mean=[mean] if self.replicas else None,
            seed=3,
            offload_anchor="offloaded" in self.kind,
        )
        return loops

    def held(self) -> list[str]:
        return [n for n, p in self.parameters.items() if any(p is q for q in self.loops.loops[0].params)]

    def trainable(self) -> list[str]:
        return [n for n in self.held() if self.parameters[n].requires_grad]

    # Training

    @precondition(lambda self: self.depth == 0)
    @rule(gradients=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), prepares=st.booleans())
    def step(self, gradients: dict[str, float], prepares: bool) -> None:
        if prepares:
            self.prepare()
        gradients = {n: g for n, g in gradients.items() if n in self.trainable()}
        for n, p in self.parameters.items():
            p.grad = torch.tensor([gradients[n]], dtype=torch.float64) if n in gradients else None
        self.optimizer.step()
        self.perturbed = False
        self.model.step(gradients, self.trainable())

    @precondition(lambda self: self.depth == 0)
    @rule()
    def prepare(self) -> None:
        self.loops.prepare()
        self.model.begin(self.trainable())
        if self.perturbs and not self.perturbed:
            self.perturb()

    def perturb(self) -> None:
        self.perturbed, self.noisy = True, set(self.trainable())
        self.model.tracked |= self.noisy

    @rule()
    def unperturb(self) -> None:
        self.loops.unperturb()
        if self.depth == 0:
            self.perturbed = False

    @precondition(lambda self: self.depth > 0)
    @rule()
    def a_step_while_x_is_shown_is_refused(self) -> None:
        for p in self.parameters.values():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="while the parameters show the anchor"):
            self.optimizer.step()

    # Looking

    @precondition(lambda self: self.depth < 3)
    @rule()
    def show(self) -> None:
        self.loops.show()
        self.depth += 1

    @precondition(lambda self: self.depth > 0)
    @rule()
    def hide(self) -> None:
        self.loops.hide()
        self.depth -= 1
        if self.depth == 0 and self.perturbed:
            self.model.begin(self.trainable())

    @precondition(lambda self: self.depth == 0)
    @rule(name=st.sampled_from(NAMES), value=VALUES)
    def look_inside_a_scope(self, name: str, value: float) -> None:
        with self.loops.loops[0].at_anchor(), self.loops.loops[0].at_anchor():
            assert self.parameters[name].item() == pytest.approx(self.model.x[name], abs=1e-12)
        if self.perturbed:
            self.model.begin(self.trainable())

    # Writing

    @precondition(lambda self: self.depth > 0 or not self.perturbed)
    @rule(name=st.sampled_from(NAMES), value=VALUES)
    def write(self, name: str, value: float) -> None:
        with torch.no_grad():
            self.parameters[name].fill_(value)
        if self.depth:
            self.model.replace(name, value) if name in self.model.tracked else self.model.write(name, value)
        else:
            self.model.write(name, value)

    @precondition(lambda self: self.depth == 0 and self.perturbed)
    @rule(name=st.sampled_from(NAMES[:3]), value=VALUES)
    def a_write_into_perturbed_weights_is_refused(self, name: str, value: float) -> None:
        if name not in self.model.tracked:
            return
        with torch.no_grad():
            self.parameters[name].add_(7.0)
        with pytest.raises(RuntimeError, match="modified while they were perturbed"):
            self.loops.unperturb()
        self.perturbed = False

    @rule(values=st.dictionaries(st.sampled_from(["b", "c"]), VALUES, min_size=2), whole=st.booleans())
    def load_weights(self, values: dict[str, float], whole: bool) -> None:
        state = {n: torch.tensor([v], dtype=torch.float64) for n, v in values.items()}
        if whole:
            state = {f"part.{n}": v for n, v in state.items()}
            module: torch.nn.Module = self.net
            state |= {n: self.net.state_dict()[n].clone() for n in ("a", "late")}
        else:
            module = self.net.part
        module.load_state_dict(state)
        for n, v in values.items():
            name = f"part.{n}"
            if name in self.model.tracked:
                self.model.replace(name, v)
            else:
                self.model.write(name, v)
        if self.perturbed and self.depth == 0:
            self.model.begin(self.trainable())

    # Structure

    @precondition(lambda self: not self.perturbed)
    @rule(name=st.sampled_from(NAMES))
    def freeze(self, name: str) -> None:
        self.parameters[name].requires_grad_(False)

    @precondition(lambda self: not self.perturbed)
    @rule(name=st.sampled_from(NAMES))
    def unfreeze(self, name: str) -> None:
        self.parameters[name].requires_grad_(True)

    @precondition(lambda self: "late" not in self.held())
    @rule()
    def add_a_group(self) -> None:
        self.optimizer.add_param_group({"params": [self.parameters["late"]]})

    @rule()
    def save_and_go_on_elsewhere(self) -> None:
        """A fresh module and loop, at the same point."""
        module, loop = copy.deepcopy(self.net.state_dict()), copy.deepcopy(self.loops.state_dict())
        frozen = [n for n, p in self.parameters.items() if not p.requires_grad]
        held = self.held()
        self.loops.detach()
        self.net = Net()
        self.parameters = dict(self.net.named_parameters())
        for n in frozen:
            self.parameters[n].requires_grad_(False)
        self.optimizer = torch.optim.SGD([self.parameters[n] for n in NAMES[:3]], lr=LR)
        if "late" in held:
            self.add_a_group()
        self.loops = self.make(self.net, self.optimizer)
        self.depth = 0
        self.loops.show()
        self.net.load_state_dict(module)
        self.loops.load_state_dict(loop)
        self.loops.hide()
        self.perturbed = False
        self.model.target = None
        if not self.model.begun:
            self.model.z = dict.fromkeys(NAMES)
        if self.perturbs:
            self.model.begin(self.trainable())
            self.perturb()

    @rule()
    def detach_and_attach_again(self) -> None:
        shown = self.depth > 0
        self.loops.detach()
        self.loops.detach()
        for n, p in self.parameters.items():
            assert p.item() == pytest.approx(self.model.x[n], abs=1e-12), (n, shown)
        self.depth, self.perturbed = 0, False
        self.attach()

    # What holds at every moment

    @invariant()
    def parameters_hold_what_the_model_says(self) -> None:
        loop = self.loops.loops[0]
        assert (loop.inner_step, loop.outer_step) == (self.model.k, self.model.t)
        for n, p in self.parameters.items():
            x, y = self.model.x[n], self.model.y[n]
            expected = x if self.depth or self.relaxation.perturb else y
            if self.perturbed and not self.depth:
                assert n not in self.noisy or abs(p.item() - expected) > 1e-12
            else:
                np.testing.assert_allclose(p.item(), expected, rtol=0, atol=1e-12, err_msg=n)

    @invariant()
    def whoever_asks_for_a_state_dict_gets_x(self) -> None:
        state = self.net.state_dict()
        for n in NAMES:
            np.testing.assert_allclose(state[n].item(), self.model.x[n], rtol=0, atol=1e-12, err_msg=n)

    @precondition(lambda self: not self.perturbed)
    @invariant()
    def anchor_and_average_are_x_and_z(self) -> None:
        loop = self.loops.loops[0]
        for p, x, z in zip(loop.params, loop.anchor, loop.average, strict=True):
            n = next(n for n, q in self.parameters.items() if q is p)
            mean = self.model.z[n]
            mean = self.model.y[n] if mean is None else mean
            if self.relaxation.perturb:
                mean = self.model.x[n]
            np.testing.assert_allclose(x.item(), self.model.x[n], rtol=0, atol=1e-12, err_msg=n)
            np.testing.assert_allclose(z.item(), mean, rtol=0, atol=1e-12, err_msg=n)

    def teardown(self) -> None:
        if hasattr(self, "loops"):
            self.loops.detach()


@pytest.mark.filterwarnings("ignore:offload_anchor=True gains nothing")
@pytest.mark.parametrize("kind", RELAXATIONS)
def test_a_loop_is_its_model(kind: str) -> None:
    machine: Any = type(f"Machine_{kind.replace(' ', '_')}", (LoopMachine,), {"kind": kind})
    run_state_machine_as_test(machine)
