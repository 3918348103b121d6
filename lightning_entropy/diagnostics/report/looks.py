"""Looks at one or two checkpoints: cheap ones first, finer ones while time is left, none that would end too late."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lightning_entropy.diagnostics.local_entropy import LocalEntropyResult
from lightning_entropy.diagnostics.loss import Loss, cross_entropy
from lightning_entropy.diagnostics.report.findings import ESTIMATORS, FIRST, SECTIONS, Left, Subject
from lightning_entropy.diagnostics.report.names import said
from lightning_entropy.diagnostics.report.pace import Pace

Clock = Callable[[], float]


class OutOfTime(Exception):
    """The budget was spent in the middle of a section."""


@dataclass
class _Times:
    """What the sections have taken, and what they will take.

    Args:
        subjects: To be measured.
        pace: Of one pass.
        examples: Of the last look.
        seen: The examples of each section's last look.
        off: By what factor each section's last look took longer than its passes say.
        drawing: The longest time that the page took to be written.
    """

    subjects: Sequence[Subject]
    pace: Pace
    examples: int
    seen: dict[str, int] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    drawing: float = 0.0

    def passes(self, section: str, size: int) -> float:
        """Return what a look takes by its count of passes."""
        first = self.subjects[0]
        settings = first.settings(section, size / self.examples)
        ladder = first.findings.results.get("local_entropy")
        settings["climbed"] = 2 * len(ladder.gammas) - 1 if isinstance(ladder, LocalEntropyResult) else None
        one = self.pace.seconds(section, settings, size, splits=first.splits)
        return len(self.subjects) * one

    def expected(self, section: str, size: int) -> float:
        """Return what a look will take, with its pictures."""
        return self.passes(section, size) * self.off.get(section, 1.0) + self.drawing


def look(
    subjects: Sequence[Subject],
    *,
    examples: int = 512,
    budget: float | None = None,
    skip: Iterable[str] = (),
    grown: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda words: None,
    start: float | None = None,
    pace: Pace | None = None,
    clock: Clock = time.monotonic,
) -> None:
    """Measure one or two checkpoints: on few examples with few draws first, then with more of both.

    All are measured alike: a look that only some of them could have counts for none. A look that would end after the
    budget is left out; what it takes is counted in gradients and Hessian-vector products, one of which is timed first,
    and corrected by what the section's look before has taken. One that takes longer than was expected is ended when
    the budget is spent. Looks that are left out say with which budget they would be taken. The loss is always measured.
    Ctrl+C ends the looking, and what was found stays.

    A section that an estimator refuses is one that says why.

    Args:
        subjects: To be measured, in turn; their ``findings`` are filled.
        examples: Of the last look, >= 1.
        budget: Seconds after which no look should end, > 0. None: only the last look is taken, whatever it takes.
        skip: Sections to leave out.
        grown: Called whenever findings have grown.
        tell: Called with a sentence before each look.
        start: When the budget began to run, by ``clock``. None: now.
        pace: Of one pass. None: timed, where there is a budget.
        clock: In seconds.

    Raises:
        ValueError: If ``skip`` names nothing, or a number is outside its range.
    """
    skip = set(skip)
    if unknown := skip - set(SECTIONS):
        raise ValueError(f"skip must name sections among {sorted(SECTIONS)}, got {sorted(unknown)}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be > 0 seconds or None, got {budget}")
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    start = clock() if start is None else start
    end = math.inf if budget is None else start + budget
    measured = [name for name in ("loss", *ESTIMATORS) if name not in skip]
    left: set[str] = set()
    ended = True
    times = None
    try:
        _record(subjects, skip, grown)
        pace = pace or (Pace.nothing() if budget is None else subjects[0].pace())
        times = _Times(subjects, pace, examples)
        looks = [examples] if budget is None else sizes(examples)
        for i, size in enumerate(looks):
            if i and _fits_twice(times, measured, looks[i + 1 : i + 2], end - clock()):
                continue  # the next finer one of every section is near
            # The quick ones first.
            for section in sorted(measured, key=lambda name: times.expected(name, size)):
                seconds = times.expected(section, size)
                if clock() + seconds > end and (section != "loss" or section in times.seen):
                    left.add(section)
                    continue
                tell(f"{section}, {size:,} examples: {_about(seconds)}, {_about(clock() - start)} used")
                try:
                    found = _take(subjects, section, size, examples, times, end, clock, grown)
                except OutOfTime:
                    left.add(section)
                    continue
                if not found:
                    measured = [name for name in measured if name != section]
                    left.discard(section)
        ended = False
    except KeyboardInterrupt:
        if not any(subject.findings.results for subject in subjects):
            raise
    finally:
        if times is not None:
            _leave(times, measured, left, ended, clock() - start)


def _take(
    subjects: Sequence[Subject],
    section: str,
    size: int,
    examples: int,
    times: _Times,
    end: float,
    clock: Clock,
    grown: Callable[[], None],
) -> bool:
    """Take a look at all subjects; False where an estimator has refused it."""
    began, passes = clock(), times.passes(section, size)

    def limited(loss: Loss | None) -> Loss | None:
        return loss if section == "loss" or math.isinf(end) else _Limited(loss or cross_entropy, end, clock)

    try:
        results = [subject.measure(section, size, size / examples, limited) for subject in subjects]
    except OutOfTime:
        if passes > 0:  # it takes more than it has been given
            times.off[section] = 1.5 * max(times.off.get(section, 1.0), (clock() - began) / passes)
        raise
    except (ValueError, RuntimeError) as error:
        for subject in subjects:
            subject.findings.failed[section] = said(error)
        return False
    if passes > 0:
        times.off[section] = max(1e-3, (clock() - began) / passes)
    times.seen[section] = size
    for subject, result in zip(subjects, results, strict=True):
        subject.findings.results[section] = result
    drawn = clock()
    grown()
    times.drawing = max(times.drawing, clock() - drawn)
    return True


class _Limited:
    """A loss that is not evaluated any more when the budget is spent."""

    def __init__(self, loss: Loss, end: float, clock: Clock) -> None:
        self._loss, self._end, self._clock = loss, end, clock

    def __call__(self, module, batch):  # type: ignore[no-untyped-def]
        if self._clock() > self._end:
            raise OutOfTime
        return self._loss(module, batch)


def _fits_twice(times: _Times, measured: list[str], following: list[int], remaining: float) -> bool:
    """Return whether all sections' next finer look fits into half of what remains: then this one is for nothing."""
    if not following or not all(name in times.seen for name in measured):
        return False
    return 2 * sum(times.expected(name, following[0]) for name in measured) < remaining


def _leave(times: _Times, measured: list[str], left: set[str], ended: bool, spent: float) -> None:
    """Note which sections have not had their last look, and the budget with which all of them would have it."""
    if ended:  # by Ctrl+C
        left = {name for name in measured if times.seen.get(name) != times.examples}
    # The looks on the way to the last one take up to half as long again.
    missing = 1.5 * sum(times.expected(name, times.examples) for name in left)
    budget = None if ended else rounded_up(spent + missing)
    for section in left:
        for subject in times.subjects:
            subject.findings.left[section] = Left(times.seen.get(section, 0), budget)


def rounded_up(seconds: float) -> int:
    """Round up to two digits.

    Example:
        >>> rounded_up(7.2), rounded_up(121.0), rounded_up(1234.0)
        (8, 130, 1300)
    """
    unit = 10 ** max(0, math.floor(math.log10(max(seconds, 1.0))) - 1)
    return math.ceil(seconds / unit) * unit


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def sizes(examples: int) -> list[int]:
    """Return how many examples the looks have, each twice as many as the one before.

    Example:
        >>> sizes(512), sizes(300), sizes(20)
        ([32, 64, 128, 256, 512], [32, 64, 128, 256, 300], [20])
    """
    found = [FIRST]
    while found[-1] < examples:
        found.append(2 * found[-1])
    return sorted({min(size, examples) for size in found})


def _record(subjects: Sequence[Subject], skip: set[str], grown: Callable[[], None]) -> None:
    if "trajectory" in skip:
        return
    for subject in subjects:
        if (recorded := subject.recording()) is not None:
            subject.findings.results["trajectory"] = recorded
            grown()
