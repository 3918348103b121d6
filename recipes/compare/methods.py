"""What each method adds to SGD: callbacks, a strategy for its replicas, a second gradient."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_entropy as le
from recipes.compare.previous_sam import PreviousSAM
from recipes.limits import check, shorten

RUN = ("lr", "steps")  # what a method may ask about the run

LENGTH = 200  # characters of a method with its options
MOST_REPLICAS = 256  # each is a process

SWA_START = 0.75  # share of the epochs before the average starts, Izmailov et al.'s choice


@dataclass
class Parts:
    """What a Trainer and a classifier need for a method.

    Attributes:
        callbacks: for the Trainer.
        strategy: makes the Trainer's strategy, told whether it is for CUDA devices; None is one process without.
        sharpness: SAM's rho.
        sharpness_start: share of the training after which SAM begins.
        label_smoothing: of the training loss.
        stops: the weights that are kept are those of least held-out error, among the points of the curve.
        by_epochs: the method wants a number of epochs rather than of steps, and may add one without gradients.
        final: scale of the learning rate at the end of its cosine.
    """

    callbacks: list[Callback] = field(default_factory=list)
    strategy: Callable[[bool], Any] | None = None
    sharpness: float = 0.0
    sharpness_start: float = 0.0
    label_smoothing: float = 0.0
    stops: bool = False
    by_epochs: bool = False
    final: float = 0.0


@dataclass(frozen=True)
class Method:
    """A method with its hyper-parameters, named as on the command line: ``name`` or ``name:option=value,...``.

    Attributes:
        label: the name with its options; what tables show.
        name: one of ``METHODS``.
        options: hyper-parameters that differ from the defaults.
    """

    label: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read ``name:option=value,...``, where a value may be a schedule such as ``Warmup(0.1, 500)``.

        Raises:
            ValueError: if the name, or an option or its value, is not known, or the text is longer than ``LENGTH``.

        Example:
            >>> Method.parse("sam:rho=0.1").options, Method.parse("sam:rho=0.1").evaluations
            ({'rho': 0.1}, 2.0)
            >>> Method.parse("hamilton_jacobi:inner_steps=5,gamma=Pull(0.5)").options
            {'inner_steps': 5, 'gamma': Pull(share=0.5)}
        """
        if len(text) > LENGTH:
            raise ValueError(f"method must have at most {LENGTH} characters, got {len(text)}: {shorten(text)}")
        name, _, rest = text.partition(":")
        if name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {shorten(name)}")
        pairs = [pair.partition("=") for pair in re.split(r",(?![^(]*\))", rest) if pair]
        try:
            options = {key.strip(): _value(value.strip()) for key, _, value in pairs}
        except (TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{text}: {error}") from error
        accepted = inspect.signature(METHODS[name]).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            for key in options:
                if key not in accepted or key in RUN:
                    own = ", ".join(p for p in accepted if p not in RUN) or "of which there is none"
                    raise ValueError(f"option must be one of {name}'s, {own}, got {key}")
        replicas = options.get("replicas", 1)
        if isinstance(replicas, bool) or not isinstance(replicas, int):
            raise ValueError(f"replicas must be an int, got {replicas!r} in {text}")
        check("replicas", replicas, 1, MOST_REPLICAS)
        method = cls(text, name, options)
        try:
            _ = method.relaxation  # makes all parts
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ValueError(f"{text}: {error}") from error
        return method

    @property
    def evaluations(self) -> float:
        """Gradient evaluations in an optimizer step of one replica, in the mean over the training."""
        parts = self.parts(lr=1.0, steps=1)
        return 2 - parts.sharpness_start if parts.sharpness else 1

    @property
    def replicas(self) -> int:
        """How many copies of the net are trained."""
        return self.options.get("replicas", 3) if self.name in REPLICATED else 1

    @property
    def relaxation(self) -> le.Relaxation | None:
        """The relaxation that it runs, the library's defaults included; None without one."""
        parts = self.parts(lr=1.0, steps=1)
        owners = [*parts.callbacks, parts.strategy and parts.strategy(False)]
        return next((owner.relaxation for owner in owners if hasattr(owner, "relaxation")), None)

    @property
    def defaults(self) -> str:
        """The signature of its maker, default values included."""
        return str(inspect.signature(METHODS[self.name]))

    def parts(self, lr: float, steps: int) -> Parts:
        """Make the method's parts for a run of ``steps`` steps at learning rate ``lr``."""
        known = {"lr": lr, "steps": steps}
        wanted = inspect.signature(METHODS[self.name]).parameters
        return METHODS[self.name](**{name: known[name] for name in RUN if name in wanted}, **self.options)


def sgd() -> Parts:
    """SGD with Nesterov momentum alone."""
    return Parts()


def stopped() -> Parts:
    """SGD stopped in time: the weights of least held-out error, looked at as often as the curve has points."""
    return Parts(stops=True)


def smoothed_labels(share: float = 0.1) -> Parts:
    """SGD with ``share`` of every label's weight spread over all classes."""
    return Parts(label_smoothing=share)


def ema(lr: float, steps: int, memory: float = 0.05, final: float = 0.0) -> Parts:
    """Exponential moving average of the weights, Lightning's callback, over the last ``memory`` * steps or so.

    ``final`` is what remains of the learning rate at the end: with 1 the average stands in the place of its decay.
    """
    check("memory", memory, 0, 100)
    check("final", final, 0, 1)
    return Parts([EMAWeightAveraging(decay=1 - 1 / max(memory * steps, 1))], final=final)


def swa(lr: float, start: float = SWA_START, lr_scale: float = 0.5, annealing_epochs: int = 0) -> Parts:
    """Stochastic weight averaging, Lightning's callback: from ``start`` on its own constant rate, ``lr_scale`` * lr.

    It averages the weights that each of its epochs begins with, so not those that the last one ends with.
    """
    check("start", start, 0, 1)
    check("lr_scale", lr_scale, 0, 1000)
    # Lightning takes 10 epochs to come to the rate unless told otherwise.
    callback = StochasticWeightAveraging(
        swa_lrs=lr_scale * lr, swa_epoch_start=start, annealing_epochs=annealing_epochs
    )
    return Parts([callback], by_epochs=True)


def sam(rho: float = 0.05, start: float = 0.0) -> Parts:
    """Sharpness-aware minimisation with radius ``rho`` > 0, from a share ``start`` of the training on.

    Two gradient evaluations a step, and one before it begins.
    """
    check("rho", rho, 1e-12, 1000)
    check("start", start, 0, 0.999)
    return Parts(sharpness=rho, sharpness_start=start)


def previous_sam(rho: float = 0.3) -> Parts:
    """SAM at one gradient a step: uphill with radius ``rho`` > 0 along the gradient of the batch before."""
    check("rho", rho, 1e-12, 1000)
    return Parts([PreviousSAM(rho)])


def lookahead(**options: Any) -> Parts:
    """Lookahead; options of ``lightning_entropy.lookahead``."""
    return Parts([le.InnerOuterCallback(le.lookahead(**options))])


def smoothed_lookahead(**options: Any) -> Parts:
    """Lookahead through the smoothed loss; options of ``lightning_entropy.smoothed_lookahead``."""
    return Parts([le.InnerOuterCallback(le.smoothed_lookahead(**options))])


def two_timescale(**options: Any) -> Parts:
    """An anchor that follows the weights slowly; options of ``lightning_entropy.two_timescale``."""
    return Parts([le.InnerOuterCallback(le.two_timescale(**options))])


def entropy_sgd(**options: Any) -> Parts:
    """Entropy-SGD; options of ``lightning_entropy.EntropySGD``."""
    return Parts([le.EntropySGD(**options)])


def hamilton_jacobi(**options: Any) -> Parts:
    """The proximal point iteration; options of ``lightning_entropy.HamiltonJacobi``."""
    return Parts([le.HamiltonJacobi(**options)])


def heat(**options: Any) -> Parts:
    """Gaussian smoothing; options of ``lightning_entropy.HeatSmoothing``."""
    return Parts([le.HeatSmoothing(**options)])


def heat_filter(gamma: float = 2.5e5, **options: Any) -> Parts:
    """Gaussian smoothing with noise in proportion to each filter's norm, as LPF-SGD; its width 0.002 = gamma^(-1/2)."""
    return Parts([le.HeatSmoothing(gamma=gamma, scale="filter", **options)])


def ddp(replicas: int = 3) -> Parts:
    """Lightning's DDP: the mean of ``replicas`` gradients a step, each of a batch of its own."""
    return Parts(strategy=partial(_ddp, replicas))


def elastic_sgd(replicas: int = 3, **options: Any) -> Parts:
    """Elastic averaging SGD; options of ``lightning_entropy.elastic_sgd``."""
    return Parts(strategy=partial(_strategy, le.elastic_sgd(**options), replicas))


def elastic_entropy(replicas: int = 3, **options: Any) -> Parts:
    """Parle; options of ``lightning_entropy.parle``."""
    return Parts(strategy=partial(_strategy, le.parle(**options), replicas))


def _ddp(replicas: int, cuda: bool) -> Any:
    return DDPStrategy(process_group_backend="gloo", **_processes(replicas, cuda))


def _strategy(relaxation: le.Relaxation, replicas: int, cuda: bool) -> Any:
    return le.ElasticEntropyStrategy(relaxation, **_processes(replicas, cuda))


def _processes(replicas: int, cuda: bool) -> dict[str, Any]:
    """Say how a strategy starts its processes, with a device for each: several may share a GPU."""
    if not cuda:
        return {"start_method": "fork"}
    devices = [torch.device("cuda", i % torch.cuda.device_count()) for i in range(replicas)]
    return {"start_method": "spawn", "parallel_devices": devices}


METHODS: dict[str, Callable[..., Parts]] = {
    make.__name__: make
    for make in (
        sgd,
        stopped,
        smoothed_labels,
        ema,
        swa,
        sam,
        previous_sam,
        lookahead,
        smoothed_lookahead,
        heat,
        heat_filter,
        two_timescale,
        entropy_sgd,
        hamilton_jacobi,
        ddp,
        elastic_sgd,
        elastic_entropy,
    )
}

SCHEDULES: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (le.Pull, le.Scoping, le.Starting, le.Warmup, le.Widening)
}

REPLICATED = ("ddp", "elastic_sgd", "elastic_entropy")


def _value(text: str) -> Any:
    if call := re.fullmatch(r"([A-Z][a-z]+)\((.+)\)", text):
        schedule = SCHEDULES.get(call[1])
        if schedule is None:
            raise ValueError(f"value must be a number, a word or one of {', '.join(SCHEDULES)}, got {shorten(text)}")
        return schedule(*ast.literal_eval(f"({call[2]},)"))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
