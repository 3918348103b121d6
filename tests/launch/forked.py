"""The launcher and its replicas in forks of a process that has imported all they need."""

import functools
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

from lightning_entropy.launch import __main__ as launcher
from lightning_entropy.launch import job
from tests import forked


class Forked:
    """A fork in the place of ``subprocess.Popen([python, "-m", module, ...])``, with what a job uses of it.

    Attributes:
        pid: of the process.
    """

    def __init__(
        self, command: list[str], *, env: dict[str, str], start_new_session: bool, preexec_fn: Callable[[], None]
    ) -> None:
        python, option, module, *arguments = command
        assert (python, option, start_new_session) == (sys.executable, "-m", True)
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            preexec_fn()
            forked.play(module, arguments, env)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _launch(arguments: list[str]) -> None:
    job.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment]
    sys.exit(launcher.main(arguments))


def start(arguments: list[str], said: Path) -> BaseProcess:
    """Start the launcher.

    Args:
        arguments: of its command line.
        said: the file for all that it and its replicas write.
    """
    return forked.start(functools.partial(_launch, arguments), said)
