"""Stopping together: what one rank wants travels with the replicas' exchanges, and all stop at the same step."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_entropy.strategies import liveness
from lightning_entropy.strategies.lightning_internals import ask_every_epoch, free_batches, handlers_of_others

STOP, TERM, INTERRUPT = "stop", "SIGTERM", "SIGINT"  # in the order of their weight


class Notices(Protocol):
    """What carries notices between replicas: the loops of one."""

    def give_notice(self, wanted: bool) -> None:
        """Say in the exchanges to come whether this rank wants something that all ranks must do together."""

    def take_notice(self) -> bool:
        """Return whether any rank has given notice since the last call."""
        ...


class OwnStop:
    """The end of a training of one replica, which is the Trainer's business: there is nobody to agree with."""

    def install(self) -> None:
        """Leave the Trainer's own means in their place."""

    def remove(self) -> None:
        """Put nothing back."""

    def hold(self) -> None:
        """Let the Trainer stop where it likes."""

    def check(self) -> None:
        """Wait for nobody."""

    def tell(self, loops: Notices | None) -> None:
        """Tell nobody."""

    def heed(self, loops: Notices | None) -> None:
        """Hear of nobody."""


class JointStop(OwnStop):
    """Collects on one rank what asks for an end of training, until the replicas have agreed on it.

    A signal is noted rather than acted upon: SIGTERM, and the first Ctrl+C (the second one ends the rank at once). So
    are the Trainer's ``should_stop`` set in a training batch, and a ``Timer`` that has run out. Lightning's own means
    would be a broadcast before every batch, which ties the replicas to each other and hangs if a signal reaches one
    rank alone. Between the exchanges of the replicas nothing is sent.

    Args:
        trainer: whose callbacks, signals and ``should_stop``.
        rank: this rank, for messages.
    """

    def __init__(self, trainer: Trainer, rank: int) -> None:
        self._trainer, self._rank = trainer, rank
        self._signal: str | None = None
        self._since = 0.0
        self._asked = self._agreed = False
        self._before: dict[int, Any] = {}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._timers = [c for c in callbacks if isinstance(c, Timer)]
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Take the place of Lightning's signal handlers and of what it asks all ranks every batch. Done once."""
        if self._undo:
            return
        self._undo = [free_batches(self._trainer), *map(ask_every_epoch, self._timers)]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._note)

    def remove(self) -> None:
        """Put back what :meth:`install` has replaced."""
        for undo in self._undo:
            undo()
        for number, handler in self._before.items():
            if handler is not None and signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._undo, self._before = [], {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == INTERRUPT:
            raise KeyboardInterrupt
        name = TERM if number == signal.SIGTERM else INTERRUPT
        if self._signal is None:
            self._since = time.monotonic()
            again = "; Ctrl+C again ends at once" if name == INTERRUPT else ""
            print(f"rank {self._rank} got {name}: the replicas stop together at their next exchange{again}", flush=True)
        self._signal = name
        for handler in handlers_of_others(self._before[number]):
            handler(number, frame)

    @property
    def wanted(self) -> bool:
        """Whether this rank asks for an end of training, which all have to come to together."""
        if self._agreed:
            return self._signal is not None
        self._asked = self._asked or self._time_is_up
        return self._asked or self._signal is not None

    @property
    def _time_is_up(self) -> bool:
        left = [timer.time_remaining() for timer in self._timers]
        return any(seconds is not None and seconds <= 0 for seconds in left)

    def hold(self) -> None:
        """Take back a ``should_stop`` that was set in a training batch, until all have agreed on it."""
        if self._trainer.should_stop and not self._agreed:
            self._trainer.should_stop = False
            self._asked = True

    def tell(self, loops: Notices | None) -> None:
        """Say in the exchanges to come whether this rank wants to stop."""
        if loops is not None:
            loops.give_notice(self.wanted)

    def heed(self, loops: Notices | None) -> None:
        """Stop together with the other ranks, if any has asked for it in an exchange that all have seen."""
        if loops is not None and loops.take_notice():
            self.act()

    def act(self) -> None:
        """Stop for whatever reason any rank has. A collective, of all ranks that have taken notice.

        Raises:
            SIGTERMException: a rank has got SIGTERM.
            KeyboardInterrupt: a rank has got SIGINT.
        """
        own = self._signal or (STOP if self._asked else None)
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, own)
        for name, error in ((INTERRUPT, KeyboardInterrupt), (TERM, SIGTERMException)):
            if name in reasons:
                rank_zero_info(f"{name} on rank {reasons.index(name)}: all replicas stop here")
                raise error
        self._agreed = self._trainer.should_stop = True
        if self._time_is_up:
            rank_zero_info("The Timer has run out: all replicas stop here.")

    def check(self) -> None:
        """Stop alone if no exchange has come within seconds of a signal.

        Raises:
            SIGTERMException: this rank has got SIGTERM.
            KeyboardInterrupt: this rank has got SIGINT.
        """
        if self._signal is not None and time.monotonic() - self._since > liveness.PATIENCE:
            print(
                f"rank {self._rank} stops alone: no exchange within {liveness.PATIENCE:g} s of {self._signal}",
                flush=True,
            )
            raise SIGTERMException if self._signal == TERM else KeyboardInterrupt
