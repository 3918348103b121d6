"""A meeting that a replica has asked for, as the one that waits for it sees it."""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lightning_entropy.strategies.torchft.records import Met, Record
from lightning_entropy.strategies.torchft.rounding import Rounding
from lightning_entropy.trainer.metrics import Event

TICK = 1.0  # seconds between two questions whether one still wants to wait
PATIENCE = 10.0  # seconds after which a replica that waits says for what


class Place(Protocol):
    """Where replicas meet."""

    @property
    def check(self) -> Callable[[], None]:
        """Raises an error if the training should not wait."""
        ...

    def explain(self) -> None:
        """Say for what this replica waits."""


class Encounter:
    """A meeting that has been asked for.

    Args:
        place: where it is.
        record: of this replica.
        payload: what it sends, flat; it is overwritten. None: it joins.
        rounding: of the first numbers of it; None: of none.
        ready: the payload is there when this has happened; None: it is.
        common: returns what all replicas have in common, for those that have missed some of it.
    """

    def __init__(
        self,
        place: Place,
        record: Record,
        payload: Tensor | None,
        common: Callable[[], dict[str, Any]] | None,
        rounding: Rounding | None = None,
        ready: Event | None = None,
    ) -> None:
        self.record, self.payload, self.common, self.rounding = record, payload, common, rounding
        self.met: Met | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._place, self._ready = place, ready
        self._since: float | None = None  # it is waited for
        self._patience = PATIENCE

    def collect(self) -> None:
        """Wait until what is sent has come from the device: in the thread that sends it, while the training goes on."""
        if self._ready is not None:
            self._ready.synchronize()

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self.over.is_set()

    def wait(self) -> Met | None:
        """Wait until it is over and return what it has brought; None: a peer was lost in the middle.

        Raises:
            ValueError: this replica trains another model than most.
        """
        while not self.look():
            self._place.check()
        if self.error is not None:
            raise self.error
        return self.met

    def look(self) -> bool:
        """Wait for a second at most, and return whether it is over. After some it is said for what it waits."""
        if self._since is None:
            self._since = time.monotonic()
        if self.over.wait(TICK):
            return True
        if time.monotonic() - self._since > self._patience:
            self._place.explain()
            self._patience *= 2
        return False
