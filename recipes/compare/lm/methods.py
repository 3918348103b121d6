"""What is compared: methods with the settings each may choose from, and arms, a method in one setting of the study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning_entropy as le
from lightning_entropy import Relaxation

Settings = Mapping[str, float]

FORMATS = ("float32", "bfloat16", "int8", "int4")  # of what replicas send
OUTER_LR = 0.7  # of an outer Nesterov step
FALL = 0.9  # of the training: over which that falls, where it does
ANY: Settings = {"outer_momentum": 0.9}  # for what does not depend on them
EMA_MEMORY = 0.05  # of the training, about, is in the average


@dataclass(frozen=True)
class Arm:
    """A method as it is trained.

    Attributes:
        method: one of ``METHODS``.
        replicas: copies of the net that share each step's tokens.
        inner_steps: H, steps between two exchanges; 0 for a method without.
        format: of what replicas send.
    """

    method: str
    replicas: int = 1
    inner_steps: int = 0
    format: str = "float32"

    def __str__(self) -> str:
        if self.replicas == 1:
            return self.method
        loops = f", H = {self.inner_steps}, {self.format}" if self.inner_steps else ""
        return f"{self.method}, {self.replicas} replicas{loops}"


@dataclass(frozen=True)
class Method:
    """A row of ``METHODS``.

    Attributes:
        optimizer: the inner one.
        relaxation: makes the loop from the inner steps and the settings; None: there is none.
        replicated: it trains replicas.
        nesterov: its outer step is Nesterov's, whose momentum is chosen too.
        ema: keep an exponential moving average, Lightning's callback.
        inner_steps: H of a method on one replica; None: the study's.
        beta1: of AdamW.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    relaxation: Callable[[int, Settings], Relaxation] | None = None
    replicated: bool = False
    nesterov: bool = False
    ema: bool = False
    inner_steps: int | None = None
    beta1: float = 0.9

    def hidden(self, inner_steps: int) -> float:
        """Return behind how many steps' computation the exchange of a step hides, on average.

        None of it where the outer step waits; with fragments, each has the steps of its delay; the anchors have all,
        and so, which is more than they can have, do DDP's gradients.
        """
        relaxation = self.relaxation and self.relaxation(inner_steps, ANY)
        if relaxation is None or relaxation.elastic_target == "anchor":
            return 1.0
        return min(relaxation.fragments * relaxation.delay / inner_steps, 1.0)

    def tried(
        self, lrs: Sequence[float], outer_momenta: Sequence[float], outer_finals: Sequence[float], outer_fall: float
    ) -> dict[str, Sequence[float]]:
        """Return each setting's name and the values that are tried.

        Args:
            lrs: learning rates.
            outer_momenta: of an outer Nesterov step.
            outer_finals: what its learning rate falls to over the training, in its first value; 1 alone is no setting.
            outer_fall: share of the training over which it does.
        """
        if not self.nesterov:
            return {"lr": lrs}
        falling = {} if list(outer_finals) == [1] else {"outer_final": outer_finals}
        if falling and outer_fall != FALL:
            falling["outer_fall"] = [outer_fall]
        return {"lr": lrs, "outer_momentum": outer_momenta, **falling}


def ddp_like(arm: Arm) -> Arm:
    """Return DDP with as many replicas and the same inner optimizer."""
    return Arm("muon_ddp" if METHODS[arm.method].optimizer == "muon" else "ddp", arm.replicas)


def _nesterov(preset: Callable[..., Relaxation], inner_steps: int, settings: Settings) -> Relaxation:
    final = settings.get("outer_final", 1.0)
    rate = OUTER_LR if final == 1 else le.Warmup(final * OUTER_LR, settings.get("outer_fall", FALL), start=OUTER_LR)
    return preset(inner_steps, outer_lr=rate, outer_momentum=settings["outer_momentum"])


def _streaming(inner_steps: int, **outer: Any) -> Relaxation:
    return le.streaming_diloco(inner_steps, delay=min(4, inner_steps - 1), **outer)


def _outer(preset: Callable[..., Relaxation]) -> Any:
    return {"relaxation": partial(_nesterov, preset), "nesterov": True}


METHODS: dict[str, Method] = {
    "adamw": Method(),
    "muon": Method("muon"),
    "ema": Method(ema=True),
    "lookahead": Method(relaxation=lambda inner_steps, _: le.lookahead(inner_steps), inner_steps=5),
    "entropy_sgd": Method(relaxation=lambda inner_steps, _: le.entropy_sgd(inner_steps), inner_steps=20),
    "hamilton_jacobi": Method(relaxation=lambda inner_steps, _: le.hamilton_jacobi(inner_steps), inner_steps=20),
    "heat": Method(relaxation=lambda _, __: le.heat(), inner_steps=1),
    "smoothed_lookahead": Method(relaxation=lambda inner_steps, _: le.smoothed_lookahead(inner_steps), inner_steps=20),
    "gpa": Method(relaxation=lambda _, __: le.gpa(), inner_steps=1, beta1=0.0),  # its mean is the momentum
    "two_timescale": Method(relaxation=lambda _, __: le.two_timescale(), inner_steps=1),
    "snoo": Method(**_outer(le.diloco)),
    "muon_snoo": Method("muon", **_outer(le.diloco)),
    "ddp": Method(replicated=True),
    "muon_ddp": Method("muon", replicated=True),
    "local_sgd": Method(relaxation=lambda inner_steps, _: le.local_sgd(inner_steps), replicated=True),
    "diloco": Method(replicated=True, **_outer(le.diloco)),
    "streaming_diloco": Method(replicated=True, **_outer(_streaming)),
    "palsgd": Method(replicated=True, **_outer(le.palsgd)),
    "muon_diloco": Method("muon", replicated=True, **_outer(le.diloco)),
    "elastic_sgd": Method(relaxation=lambda inner_steps, _: le.elastic_sgd(inner_steps, rho=1.0), replicated=True),
    "parle": Method(relaxation=lambda inner_steps, _: le.parle(inner_steps), replicated=True),
}
