"""A piece of work in a forked child: what it leaves, what it says, how it ends, and that it ends."""

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HANG = "hang"
GRACE = 2.0  # seconds in which a child that hangs writes where


@dataclass
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, negative for a signal; HANG where it was stopped by the time limit.
        said: standard output and error, tracebacks of a hang too.
        result: what the work returned; None without.
    """

    code: int | str
    said: str
    result: Any = None

    @property
    def error(self) -> str:
        """Its last line, the error's where there is one."""
        return next((line for line in reversed(self.said.splitlines()) if line.strip()), "")


def in_child(work: Callable[[], Any], folder: Path, *, limit: float) -> Ended:
    """Run a function in a child, which starts with all that is imported here.

    Args:
        work: returns what torch can save.
        folder: a new one, for its files.
        limit: seconds after which it hangs.
    """
    folder.mkdir(parents=True)
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(work, folder, limit))
    process.start()
    process.join(limit + GRACE)
    code: int | str = HANG
    if process.is_alive():
        process.kill()
        process.join()
    else:
        code = process.exitcode
    result = folder / "result.pt"
    said = (folder / "said.txt").read_text(errors="replace") if (folder / "said.txt").exists() else ""
    return Ended(code, said, torch.load(result, weights_only=True) if result.exists() else None)


def _child(work: Callable[[], Any], folder: Path, limit: float) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(scratch), str(scratch)  # a killed child removes nothing
    said = open(folder / "said.txt", "w", buffering=1)  # noqa: SIM115, for as long as the child lives
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    sys.stdout = sys.stderr = said
    faulthandler.enable(said)
    faulthandler.dump_traceback_later(limit, file=said)  # where it hangs, if it does
    warnings.resetwarnings()
    warnings.simplefilter("always")
    # Whatever the parent does with its warnings (a test runner keeps them).
    warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: print(
        warnings.formatwarning(message, category, filename, lineno, line), file=said, end=""
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        result = work()
        torch.save(result, folder / "result.part")
        os.replace(folder / "result.part", folder / "result.pt")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        code = 1
        sys.setprofile(None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        said.flush()
        os._exit(code)  # no handler of the parent's (a test runner's, say) is the child's to call
