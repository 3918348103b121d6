"""The job of one replica: started, started again when it dies, and signalled."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_entropy.strategies.torchft.status import read

LONGEST_PAUSE = 30.0  # seconds before a job that has died is started again
IN_VAIN = 5  # deaths in a row without an outer step between them, after which it is left
DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Job:
    """One replica's process, and the ones that follow it.

    Args:
        replica: its number.
        command: of the process.
        environment: of the process.
        status: the file in which the replica reports.

    Attributes:
        replica: its number.
        restarts: how often it was started again.
        code: exit status of the process that ended last, 128 + n for signal n; None before one has.
    """

    def __init__(self, replica: int, command: list[str], environment: dict[str, str], status: Path) -> None:
        self.replica, self.restarts = replica, -1
        self.code: int | None = None
        self._command, self._environment, self._status = command, environment, status
        self._process: subprocess.Popen[bytes] | None = None
        self._since = self._next = time.monotonic()
        self._in_vain = 0
        self.start()

    def start(self) -> None:
        """Start the process."""
        self._status.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            start_new_session=True,  # Ctrl+C in the terminal reaches the launcher alone, which passes it on
            preexec_fn=_die_with_parent,
        )
        self.restarts += 1
        self._since = time.monotonic()

    @property
    def runs(self) -> bool:
        """Whether the process is there."""
        return self._process is not None

    @property
    def reports(self) -> bool:
        """Whether the process has reported an outer step."""
        return bool(read(self._status))

    @property
    def lost(self) -> bool:
        """Whether it is not worth another start."""
        return self._in_vain >= IN_VAIN

    def look(self) -> bool:
        """Note whether the process has ended since the last look, and return it."""
        if self._process is None or (code := self._process.poll()) is None:
            return False
        self.code = code if code >= 0 else 128 - code
        process, self._process = self._process, None
        if code:
            with suppress(ProcessLookupError):  # other ranks of the replica, which may not know yet
                os.killpg(process.pid, signal.SIGKILL)
            self._in_vain = 0 if self.reports else self._in_vain + 1
            self._next = time.monotonic() + min(2.0**self._in_vain, LONGEST_PAUSE)
        return True

    @property
    def due_later(self) -> bool:
        """Whether it has died and is to be started again, now or later."""
        return not self.runs and bool(self.code) and not self.lost

    @property
    def due(self) -> bool:
        """Whether it is time to."""
        return self.due_later and time.monotonic() >= self._next

    def send(self, number: int) -> None:
        """Send a signal to the process, if it is there."""
        if self._process is not None:
            self._process.send_signal(number)

    def line(self) -> str:
        """Return a line for people: where the replica is."""
        if not self.runs:
            status = read(self._status)
            state = "has ended well" if self.code == 0 else f"has ended with {describe(self.code)}"
            state += f" at step {status['step']}" if "step" in status else ""
        else:
            state = f"{_progress(read(self._status))}, alive for {clock(time.monotonic() - self._since)}"
        again = f", started again {self.restarts} time{'s' if self.restarts > 1 else ''}" if self.restarts else ""
        return f"replica {self.replica}: {state}{again}"


def describe(code: int | None) -> str:
    """Return an exit status in words.

    Example:
        >>> describe(137), describe(3)
        ('SIGKILL', 'exit code 3')
    """
    if code is not None and code > 128:
        try:
            return signal.Signals(code - 128).name
        except ValueError:
            pass
    return f"exit code {code}"


def clock(seconds: float) -> str:
    """Return a time in words of a clock.

    Example:
        >>> clock(83.4), clock(3725)
        ('1:23', '1:02:05')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _progress(status: dict[str, Any]) -> str:
    if not status:
        return "starts"
    parts = [f"step {status['step']}"]
    if "entropy/outer_step" in status:
        parts.append(f"outer step {status['entropy/outer_step']}")
    if "entropy/spread" in status:
        parts.append(f"spread {status['entropy/spread']:.2e}")
    if "entropy/replicas" in status:
        parts.append(f"{status['entropy/replicas']} met")
    return ", ".join(parts)


def _die_with_parent() -> None:
    """End with the launcher, however that ends: nobody else would end a replica that waits for others."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)
