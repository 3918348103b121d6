"""``python -m MODULE`` in a fork of a process that has imported Lightning and this package, which takes seconds.

For tests that are not about how a process starts. The process is one of multiprocessing, a forkserver, without threads.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning_entropy  # noqa: F401  what the forks find imported

ROOT = Path(__file__).parents[1]


def exit_after(work: Callable[[], Any]) -> None:
    """End the process when the work ends, with the status that Python would have."""
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def play(module: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Do in this process what ``python -m`` does, in that environment, and end it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    exit_after(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def start(work: Callable[[], Any], out: Path, err: Path | None = None) -> BaseProcess:
    """Start a fork.

    Args:
        work: what it does; can be pickled.
        out: the file for its standard output.
        err: for its standard error, if that is another one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_fork, args=(work, out, err))
    process.start()
    return process


def _fork(work: Callable[[], Any], out: Path, err: Path | None) -> None:
    for number, path in ((1, out), (2, err or out)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    exit_after(work)


def run(
    module: str,
    *arguments: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 200.0,
) -> "subprocess.CompletedProcess[str]":
    """Run a module with these arguments, as :func:`subprocess.run` does with ``capture_output``.

    Args:
        module: its name.
        arguments: of the command line.
        cwd: the folder it runs in, where it finds modules, too.
        env: its environment; None: this process's.
        timeout: seconds.
    """
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(functools.partial(_run, module, given, str(cwd), dict(env or os.environ)), out, err)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *given], timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess([module, *given], process.exitcode, out.read_text(), err.read_text())


def _run(module: str, arguments: list[str], cwd: str, environment: Mapping[str, str]) -> None:
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    play(module, arguments, environment)
