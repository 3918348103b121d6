"""The launcher and its replicas in forks of a process that has imported all they need: an import takes seconds."""

import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning_entropy.launch import __main__ as launcher
from lightning_entropy.launch import job


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
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = [module, *arguments]
            _exit_after(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))

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


def _exit_after(work: Callable[[], Any]) -> None:
    """End the process when the work ends, with the status that Python would have."""
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _launch(arguments: list[str], said: Path) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    job.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment]
    _exit_after(lambda: sys.exit(launcher.main(arguments)))


def start(arguments: list[str], said: Path) -> BaseProcess:
    """Start the launcher.

    Args:
        arguments: of its command line.
        said: the file for all that it and its replicas write.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_launch, args=(arguments, said))
    process.start()
    return process
