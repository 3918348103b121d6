"""How many steps a method may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["compute", "steps"]


@dataclass(frozen=True)
class Budget:
    """The gradient evaluations of ``epochs`` passes over the data, turned into steps.

    ``compute``: every method spends the same number of gradient evaluations, so that SAM, which takes two a step,
    makes half the steps, and n replicas make 1/n of the steps each. ``steps``: each replica makes as many steps as
    the method would alone, and n replicas spend n times the evaluations; to be shown apart.

    Attributes:
        epochs: passes over the training images, counting every gradient evaluation of every replica (``compute``).
        batches: batches in a pass.
        kind: ``compute`` or ``steps``.

    Raises:
        ValueError: if a number is below 1 or ``kind`` is unknown.
    """

    epochs: int
    batches: int
    kind: Kind = "compute"

    def __post_init__(self) -> None:
        for name in ("epochs", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.kind not in ("compute", "steps"):
            raise ValueError(f"kind must be compute or steps, got {self.kind}")

    def steps(self, evaluations: float, replicas: int) -> int:
        """Count the optimizer steps of each replica.

        Args:
            evaluations: gradient evaluations in a step, in the mean.
            replicas: copies of the net.

        Returns:
            The largest number of steps within the budget.

        Raises:
            ValueError: if the budget does not suffice for one step.

        Example:
            >>> [Budget(epochs=3, batches=10).steps(*cost) for cost in ((1, 1), (2, 1), (1, 3))]
            [30, 15, 10]
            >>> Budget(epochs=3, batches=10, kind="steps").steps(1, 3)
            30
        """
        shared = replicas if self.kind == "compute" else 1
        steps = int(self.epochs * self.batches / (evaluations * shared) + 1e-9)
        if steps < 1:
            raise ValueError(f"epochs must leave a step for {replicas} replicas, got {self.epochs}")
        return steps
