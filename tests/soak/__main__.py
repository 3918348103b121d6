"""Disturb trainings at random and see that they end where undisturbed ones do: ``python -m tests.soak --rounds 300``.

A round is a random training in a child process that is killed, stopped, interrupted, ended by an exception or by a full
disk at a random moment, or resumed with something wrong. It goes on from its last whole checkpoint; weights, optimizer
and the loops' state (y, z, k, t) at its end are compared bit for bit with those of a training that nothing happened to.
Where they differ, so must plain Lightning's. The exit code is 1 after any hang, difference or wrong error.

With ``--replicas`` a round is a job of two or four ranks, one of which is disturbed: the others must name it, or stop
with it at the same step, and the job's resume must end where an undisturbed one does.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.soak import replicas
from tests.soak.rounds import BAD, Outcome, Verdict, play


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the counts of every disturbance's verdicts."""
    counts = Counter((o.kind, o.verdict) for o in outcomes)
    kinds = sorted({o.kind for o in outcomes})
    rows = [["", *[v.value for v in Verdict]]]
    rows += [[kind, *[str(counts[kind, v] or "-") for v in Verdict]] for kind in kinds]
    rows += [["all", *[str(sum(o.verdict is v for o in outcomes)) for v in Verdict]]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def soak(seed: int, rounds: Iterable[int], *, limit: float = 120.0, verbose: bool = False) -> list[Outcome]:
    """Play rounds and print what is bad of them; ``limit`` and ``seed`` as in :func:`play`."""
    outcomes = []
    for number in rounds:
        with tempfile.TemporaryDirectory() as folder:
            outcome = play(seed, number, Path(folder), limit=limit)
        outcomes.append(outcome)
        if verbose or outcome.verdict in BAD:
            print(f"round {number}, {outcome.kind}: {outcome.verdict.value}", *outcome.notes, sep="\n  ", flush=True)
    return outcomes


def soak_replicas(seed: int, rounds: Iterable[int], *, verbose: bool = False) -> list[Outcome]:
    """Play rounds with several ranks and print what is bad of them."""
    outcomes = []
    with tempfile.TemporaryDirectory() as whole:
        for number in rounds:
            with tempfile.TemporaryDirectory() as folder:
                outcome = replicas.play(seed, number, Path(folder), Path(whole))
            outcomes.append(outcome)
            if verbose or outcome.verdict in BAD:
                print(
                    f"round {number}, {outcome.kind}: {outcome.verdict.value}", *outcome.notes, sep="\n  ", flush=True
                )
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Play rounds, print a table and how the bad ones are repeated, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of all rounds (default: 0)")
    parser.add_argument("--round", type=int, action="append", help="play this one alone, and say what happens in it")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds until a training hangs (default: 120)")
    parser.add_argument("--replicas", action="store_true", help="jobs of several ranks, of which one is disturbed")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("trainings are forked and killed, which needs Linux")
    start = time.monotonic()
    numbers = range(options.rounds) if options.round is None else options.round
    verbose = options.round is not None
    if options.replicas:
        outcomes = soak_replicas(options.seed, numbers, verbose=verbose)
    else:
        outcomes = soak(options.seed, numbers, limit=options.limit, verbose=verbose)
    print(f"\n{len(outcomes)} rounds of seed {options.seed} in {time.monotonic() - start:.0f} s\n\n{table(outcomes)}")
    bad = [o for o in outcomes if o.verdict in BAD]
    if bad:
        again = " ".join(f"--round {o.number}" for o in bad)
        which = "--replicas " if options.replicas else ""
        print(f"\nagain: python -m tests.soak {which}--seed {options.seed} {again}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
