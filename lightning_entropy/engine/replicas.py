"""What an outer step gets from the other replicas, through one callable that takes the mean of a list of tensors."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

from torch import Tensor

from lightning_entropy.engine.weights import Slot

# Starts the mean over replicas; a callable result waits for it, a list is the mean itself.
ReplicaMean = Callable[[list[Tensor]], list[Tensor] | Callable[[], list[Tensor]]]


class Replicas:
    """The mean over replicas that the outer step needs: of x, of z, or of x - z.

    The mean of the old anchors is known from the moment the last outer step ended: it is started there, and waited for
    L inner steps later.

    Args:
        mean: of a list of tensors over replicas; None: there is one replica.
        target: the relaxation's ``elastic_target``.
    """

    def __init__(self, mean: ReplicaMean | None, target: str) -> None:
        self._mean = mean
        self._target = target
        self._under_way: list[Tensor] | Callable[[], list[Tensor]] | None = None

    def __bool__(self) -> bool:
        return self._mean is not None

    def start(self, slots: list[Slot]) -> None:
        """Start the mean of x, if that is the target and it is not under way."""
        if self._mean is not None and self._target == "anchor" and self._under_way is None:
            self._under_way = self._mean([slot.anchor for slot in slots])
            for slot in slots:
                slot.replaced = False

    def forget(self) -> None:
        """Drop the mean under way: of anchors that are no longer what they were."""
        if callable(self._under_way):
            self._under_way()
        self._under_way = None

    def common(self, slots: list[Slot]) -> list[Tensor]:
        """Give z of every slot; with the target ``"pseudo_gradient"``, x less the mean over replicas of x - z."""
        means = [slot.mean for slot in slots]
        if self._mean is None or self._target != "pseudo_gradient":
            return means
        drift = _wait(self._mean([slot.anchor - z for slot, z in zip(slots, means, strict=True)]))
        return [slot.anchor - d for slot, d in zip(slots, drift, strict=True)]

    def pulls(self, slots: list[Slot], means: list[Tensor], rho: float) -> list[Tensor | None]:
        """Give rho (x - mean over replicas of x, or of z) of every slot; None where there is none."""
        targets: list[Tensor] = []
        if self._under_way is not None:
            targets, self._under_way = _wait(self._under_way), None
            # An x that a user has replaced since is not pulled to the mean of the old ones.
            tied = [None if slot.replaced else target for slot, target in zip(slots, targets, strict=False)]
            return self._pulls(slots, tied, rho)
        if self._target == "average" and rho:
            targets = means if self._mean is None else _wait(self._mean(means))
        return self._pulls(slots, targets, rho)

    @staticmethod
    def _pulls(slots: list[Slot], targets: Sequence[Tensor | None], rho: float) -> list[Tensor | None]:
        # A parameter that was unfrozen since the mean was started has no target yet.
        pairs = zip_longest(slots, targets if rho else [])
        return [None if target is None else (slot.anchor - target).mul_(rho) for slot, target in pairs]


def _wait(mean: list[Tensor] | Callable[[], list[Tensor]]) -> list[Tensor]:
    return mean() if callable(mean) else mean
