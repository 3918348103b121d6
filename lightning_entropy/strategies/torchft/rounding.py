"""What replicas that come and go send with fewer bits: what they have in common decides how."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_entropy.strategies.compression import EagerCodec, Format
from lightning_entropy.strategies.summation import Collectives, Sum

ALONE = 0  # in the place of a mean's key: values are sent as they are, not as differences from one
NEW = -1  # there is no mean yet


@dataclass
class Left:
    """What a sum leaves for the next one.

    Attributes:
        residual: the rounding error of this replica's values.
        share: that of this rank's share of the sum; None: nothing.
        place: this rank, and how many took part: a share is of these.
    """

    residual: Tensor | None = None
    share: Tensor | None = None
    place: tuple[int, int] = (-1, 0)


@dataclass
class Rounding:
    """How the first numbers of what a replica sends are rounded.

    The others must know what a difference is from. Hence, where not all that meet have the same last mean, because one
    is new or was not in the last meeting, all send the numbers themselves, in full.

    Attributes:
        format: below float32.
        size: how many numbers.
        key: of the last mean; ``ALONE`` or ``NEW``.
        reference: that mean, for those whose key is another.
        left: by the sum before, which is added to this one.
        lost: whether this replica's numbers are not finite, so that it sends zeros: in the host's memory when the
            numbers are there.
        payload: bytes sent, when the sum is there.
    """

    format: Format
    size: int
    key: int = NEW
    reference: Tensor | None = None
    left: Left | None = None
    lost: Tensor | None = None
    payload: int = 0

    def sum(self, values: Tensor, group: Collectives, rank: int, *, whole: bool) -> tuple[Tensor, Left]:
        """Return the sum over the replicas that meet, and what it leaves. A collective.

        Args:
            values: of this replica, flat; they may be overwritten.
            group: of those that meet.
            rank: of this one.
            whole: send the numbers themselves; else, if there is a reference, their differences from it.
        """
        before, lost = self.left or Left(), self.lost is not None and bool(self.lost)
        if lost:
            values = torch.zeros_like(values)
        elif not whole:
            values = values if self.reference is None else values - self.reference
            if before.residual is not None:
                values = values + before.residual
        place = rank, group.size
        share = before.share if before.place == place and not whole else None
        in_progress = Sum(values, group, None if whole else EagerCodec(self.format), share)
        total = in_progress.result().to(values.dtype)
        self.payload = in_progress.payload
        if whole:
            return total, Left()
        residual = before.residual if lost else in_progress.left
        return total, Left(residual, in_progress.residual, place)
