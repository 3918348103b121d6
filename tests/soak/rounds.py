"""One round: a training is disturbed, goes on, and is compared with one that was not."""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.soak import disturbances, wrong_resumes
from tests.soak.children import HANG, Ended, in_child
from tests.soak.disturbances import Disturbance, watched
from tests.soak.trainings import Training


class Verdict(Enum):
    """How a round ended; the last three are bad."""

    EQUAL = "equal"
    LIKE_PLAIN = "as plain Lightning"  # not exact, and neither is Lightning without us
    SAID = "as said"  # refused, or warned of and gone on with
    DIFFERS = "DIFFERS"
    WRONG_ERROR = "WRONG ERROR"
    HANG = "HANG"


KINDS = (*disturbances.KINDS, "wrong", "wrong", "wrong")  # a wrong resume is of its own kind in the end
BAD = (Verdict.DIFFERS, Verdict.WRONG_ERROR, Verdict.HANG)


@dataclass
class Outcome:
    """What a round showed.

    Attributes:
        number: of the round.
        kind: of its disturbance: a key of KINDS of ``disturbances`` or of ``wrong_resumes``.
        verdict: how it ended.
        notes: what happened, line by line.
    """

    number: int
    kind: str
    verdict: Verdict = Verdict.EQUAL
    notes: list[str] = field(default_factory=list)


class _Bad(Exception):
    """A round ends here."""

    def __init__(self, verdict: Verdict, note: str) -> None:
        super().__init__(note)
        self.verdict = verdict


def play(seed: int, number: int, folder: Path, *, limit: float = 120.0) -> Outcome:
    """Play one round.

    Args:
        seed: with the number, of all that is random.
        number: of the round.
        folder: an empty one.
        limit: seconds that a training may take before it hangs.
    """
    draw = random.Random(f"{seed}:{number}")
    training = Training.drawn(draw)
    outcome = Outcome(number, draw.choice(KINDS), notes=[str(training)])
    try:
        _Round(draw, training, folder, limit, outcome).play()
    except _Bad as bad:
        outcome.verdict = bad.verdict
        outcome.notes.append(str(bad))
    return outcome


class _Round:
    def __init__(self, draw: random.Random, training: Training, folder: Path, limit: float, outcome: Outcome) -> None:
        self.draw, self.training, self.folder, self.limit, self.outcome = draw, training, folder, limit, outcome
        self.whole: Any = None

    def play(self) -> None:
        whole = self._run(self.training, "whole", _nothing)
        self._must_end(whole, "undisturbed")
        self.whole, calls = whole.result
        kind, wrong = self.outcome.kind, self.outcome.kind == "wrong"
        hurt: list[Disturbance] = []
        for _ in range(1 if wrong else self.draw.choice([1, 1, 2])):
            how = self.draw.choice(list(disturbances.KINDS)) if wrong else kind
            at_hooks = self.training.save_on_exception  # plain Lightning is to save the same file
            hurt.append(Disturbance.drawn(self.draw, how, calls, at_hooks=at_hooks))
        starts, ended = self._hurt(self.training, "hurt", hurt)
        if wrong:
            self._resume_wrongly(newest(self.folder / "hurt.files"))
            ended = None  # to be seen again: what was tried wrongly has spoiled no file
        if ended is None:
            starts.append(self._kept(newest(self.folder / "hurt.files"), len(starts)))
            ended = self._go_on(self.training, "hurt.end", starts[-1])
        if same(ended.result[0], self.whole):
            return
        self.outcome.notes.append(f"from {starts[-1]}: {difference(ended.result[0], self.whole)}")
        if self._plain_is_exact(hurt, starts):
            self.outcome.verdict = Verdict.DIFFERS
        elif self.outcome.verdict is Verdict.EQUAL:
            self.outcome.verdict = Verdict.LIKE_PLAIN

    def _run(
        self,
        training: Training,
        name: str,
        on_call: Callable[[str, int], None],
        checkpoint: Path | None = None,
        files: Path | None = None,
    ) -> Ended:
        folder = self.folder / name
        fit = partial(training.fit, files or folder / "files", checkpoint)
        ended = in_child(lambda: watched(fit, on_call), folder, limit=self.limit)
        if ended.code == HANG:
            raise _Bad(Verdict.HANG, f"{name}: {ended.said[-2000:]}")
        return ended

    def _hurt(self, training: Training, name: str, hurt: list[Disturbance]) -> tuple[list[Path | None], Ended | None]:
        """Disturb a training and its resumes; return what each started from, and how it ended if it did after all."""
        files, starts = self.folder / f"{name}.files", []
        for i, disturbance in enumerate(hurt):
            starts.append(self._kept(newest(files), i))
            ended = self._run(training, f"{name}.{i}", disturbance.strike, starts[-1], files)
            self.outcome.notes.append(f"{disturbance}: exit code {ended.code}, {ended.error[:200]}")
            self._must_be_of(disturbance, ended)
            if ended.result is not None:
                return starts, ended
        return starts, None

    def _kept(self, path: Path | None, number: int) -> Path | None:
        """Return a copy of a checkpoint, which a resume may overwrite."""
        if path is None:
            return None
        copy = self.folder / f"{number}.{path.name}"
        shutil.copyfile(path, copy)
        return copy

    def _must_be_of(self, disturbance: Disturbance, ended: Ended) -> None:
        codes, error = EXPECTED[disturbance.kind]
        if ended.result is None and (ended.code not in codes or not re.search(error, ended.said)):
            raise _Bad(Verdict.WRONG_ERROR, ended.said[-2000:])

    def _must_end(self, ended: Ended, name: str) -> None:
        if ended.result is None:
            raise _Bad(Verdict.WRONG_ERROR, f"{name}: exit code {ended.code}, {ended.said[-2000:]}")

    def _go_on(self, training: Training, name: str, start: Path | None) -> Ended:
        ended = self._run(training, name, _nothing, start)
        self._must_end(ended, f"resumed from {start}")
        return ended

    def _resume_wrongly(self, start: Path | None) -> None:
        if start is None:
            self.outcome.kind = "nothing saved"
            return
        kind, wrong = wrong_resumes.drawn(self.draw, self.training, start, self.folder / "changed")
        self.outcome.kind = kind
        ended = self._run(wrong.training, "wrong", _nothing, wrong.checkpoint)
        self.outcome.notes.append(f"{kind}, {wrong.what}: exit code {ended.code}, {ended.error[:300]}")
        if ended.result is not None and wrong.harmless and same(ended.result[0], self.whole):
            return
        complete = torch.load(start, weights_only=True)["global_step"] == self.whole["step"]
        if ended.result is not None and complete and same(ended.result[0]["module"], self.whole["module"]):
            return  # nothing was left to do, so that there is nothing to say
        tracebacks = len(re.findall(r"^During handling of the above exception", ended.said, re.MULTILINE))
        if wrong.refused is None:
            good = ended.result is not None and (wrong.warned is None or re.search(wrong.warned, ended.said))
        else:
            good = ended.code == 1 and re.search(wrong.refused, ended.error) and not tracebacks
        if not good:
            raise _Bad(Verdict.WRONG_ERROR, f"expected {wrong.refused or wrong.warned!r}: {ended.said[-2000:]}")
        self.outcome.verdict = Verdict.SAID

    def _plain_is_exact(self, hurt: list[Disturbance], starts: list[Path | None]) -> bool:
        """Whether Lightning without us ends equally, when it goes on from where ours did."""
        plain = self.training.plain
        whole = self._run(plain, "plain", _nothing)
        self._must_end(whole, "plain")
        known = {_progress(path): path for path in _whole_files(self.folder / "plain" / "files")}
        for i, start in enumerate(starts):
            if start is None:
                continue
            if _progress(start) not in known:  # saved on an exception
                others, ended = self._hurt(plain, "plain.hurt", hurt)
                last = newest(self.folder / "plain.hurt.files")
                known |= {_progress(path): path for path in (*others, last) if path is not None}
                if ended is not None and not same(ended.result[0], whole.result[0]):
                    return False
            again = self._go_on(plain, f"plain.{i}", known[_progress(start)])
            if not same(again.result[0], whole.result[0]):
                return False
            found = _whole_files(self.folder / f"plain.{i}" / "files")
            known = {_progress(path): path for path in found} | known
        return True


def _progress(path: Path) -> str:
    """Return how far a checkpoint's training has come, and its loader, the same with and without us."""
    return repr(torch.load(path, weights_only=True)["loops"]["fit_loop"])


def _nothing(place: str, number: int) -> None:
    """Do nothing."""


# Exit codes, and what must have been said.
EXPECTED: dict[str, tuple[tuple[int, ...], str]] = {
    "kill": ((-9,), ""),
    "terminate": ((0, -15), ""),
    "interrupt": ((1,), ""),
    "exception": ((1,), r"Hurt: in \w+\s*$"),
    "full disk": ((1,), r"OSError: \[Errno 27\] File too large\s*$"),
}


def _whole_files(folder: Path) -> list[Path]:
    """Return the checkpoints that can be read, oldest first."""
    found = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        found.append(path)
    return found


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint that can be read."""
    return next(reversed(_whole_files(folder)), None)


def same(left: Any, right: Any) -> bool:
    """Compare nested states bit for bit."""
    return difference(left, right) is None


def difference(left: Any, right: Any, where: str = "") -> str | None:
    """Return where two nested states differ first, and how; None where they are equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right):
            return None
        most = (left.double() - right.double()).abs().max() if left.shape == right.shape else "shapes"
        return f"{where} differs by {most}"
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        found = (difference(left[key], right[key], f"{where}/{key}") for key in left)
        return next((one for one in found if one), None)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        found = (difference(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(left, right, strict=True)))
        return next((one for one in found if one), None)
    return None if type(left) is type(right) and left == right else f"{where}: {left!r} and {right!r}"[:300]
