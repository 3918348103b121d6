"""All replicas' jobs: started again while the training goes on, ended together."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from lightning_entropy.launch.job import Job, clock, describe

LOOK = 0.2  # seconds between two looks at the jobs
GRACE = 60.0  # seconds from the first signal to SIGKILL


class Jobs:
    """Runs the jobs to their end.

    A job that dies is started again, while no other has ended well: then the training is over, and it would begin anew
    alone. Ctrl+C and SIGTERM are passed on once; a second one ends the jobs at once.

    Args:
        jobs: started.
        say: prints a line.
        every: seconds between two reports of where they are.
    """

    def __init__(self, jobs: Sequence[Job], say: Callable[[str], None], every: float) -> None:
        self._jobs, self._say, self._every = jobs, say, every
        self._signals: list[int] = []
        self._wake = threading.Event()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        self._wake.set()

    def run(self) -> int:
        """Return the exit status: 0 if the training has ended well, 128 + n after signal n, else a failed job's."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        began = told = time.monotonic()
        ending, passed = 0.0, 0
        while any(job.runs or (job.due_later and not self._over) for job in self._jobs):
            self._wake.wait(LOOK)
            self._wake.clear()
            if len(self._signals) > passed:
                passed = len(self._signals)
                ending = ending or time.monotonic()
                self._pass_on(signal.SIGKILL if passed > 1 else self._signals[0])
            elif ending and time.monotonic() - ending > GRACE:
                self._pass_on(signal.SIGKILL)
            for job in self._jobs:
                self._look_after(job)
            if time.monotonic() - told >= self._every:
                told = time.monotonic()
                self._say(f"after {clock(told - began)}:\n{self._lines()}")
        code = self._code()
        how = "well" if code == 0 else f"with {describe(code)}"
        self._say(f"the training has ended {how} after {clock(time.monotonic() - began)}:\n{self._lines()}")
        return code

    def _lines(self) -> str:
        return "\n".join(f"  {job.line()}" for job in self._jobs)

    @property
    def _done(self) -> bool:
        return any(job.code == 0 and not job.runs for job in self._jobs)

    @property
    def _over(self) -> bool:
        return bool(self._signals) or self._done

    def _look_after(self, job: Job) -> None:
        ended = job.look()
        if ended and job.code == 0 and not job.reports and not self._signals:
            self._say(
                f"replica {job.replica} has ended well and reported no outer step: had its checkpoint all of them, or "
                "has its Trainer no ElasticEntropyStrategy(membership='torchft')?"
            )
        if ended and job.code:
            if self._over:
                then = ""
            elif job.lost:
                then = ": it has died too often without an outer step between, and is not started again"
            else:
                then = ": it is started again"
            self._say(f"replica {job.replica} has ended with {describe(job.code)}{then}")
        if job.due and not self._over:
            job.start()
        if self._done and job.runs and job.restarts and not job.reports:
            job.send(signal.SIGTERM)  # it has come too late, and would begin anew alone

    def _pass_on(self, number: int) -> None:
        for job in self._jobs:
            job.send(number)

    def _code(self) -> int:
        if self._signals:
            return 128 + self._signals[0]
        codes = [job.code or 0 for job in self._jobs]
        # One that died when another had ended well has lost nothing that counts.
        failed = [code for job, code in zip(self._jobs, codes, strict=True) if code and (job.lost or all(codes))]
        return failed[0] if failed else 0


def devices(replicas: int, each: int, visible: str | None, count: int) -> list[str | None]:
    """Return for every replica which CUDA devices it sees; None: what the launcher sees.

    Args:
        replicas: how many.
        each: devices of one.
        visible: ``CUDA_VISIBLE_DEVICES`` of the launcher; None: unset.
        count: how many devices it sees; where they are fewer than needed, replicas share them.

    Example:
        >>> devices(3, 1, "4,6", 2), devices(2, 2, None, 4), devices(2, 1, None, 0)
        (['4', '6', '4'], ['0,1', '2,3'], [None, None])
    """
    names = [str(i) for i in range(count)] if visible is None else visible.split(",")[:count]
    if not count:
        return [None] * replicas
    seen = [dict.fromkeys(names[(r * each + i) % count] for i in range(each)) for r in range(replicas)]
    return [",".join(some) for some in seen]


def start(command: list[str], replicas: int, each: int, lighthouse: str, folder: Path) -> list[Job]:
    """Start a job for every replica.

    Args:
        command: of a job.
        replicas: how many.
        each: devices of one.
        lighthouse: its address.
        folder: for the files in which they report.
    """
    import torch

    jobs = []
    seen = devices(replicas, each, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    for replica, device in enumerate(seen):
        status = folder / f"{replica}.json"
        environment = {
            "RUST_LOG": "error",  # torchft writes several lines a meeting
            # Every job finds a port of its own: one that all are given could be one's alone.
            **{name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")},
            "TORCHFT_LIGHTHOUSE": lighthouse,
            "REPLICA_GROUP_ID": str(replica),
            "NUM_REPLICA_GROUPS": str(replicas),
            "LIGHTNING_ENTROPY_STATUS": str(status),
        }
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        jobs.append(Job(replica, command, environment, status))
    return jobs


def say(text: str) -> None:
    """Print lines for people."""
    print(text, file=sys.stderr, flush=True)
