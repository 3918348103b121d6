"""Run Lightning's own tests with a callback of ours in every Trainer, and say what fails that did not without it.

::

    python -m tests.lightning_suite ~/pytorch-lightning/tests/tests_pytorch --callback entropy_sgd
    python -m tests.lightning_suite ~/pytorch-lightning/tests/tests_pytorch --callback heat -- -k checkpoint

Lightning's tests are not in its wheels: the path is that of a checkout of the version that is installed. They are run
twice, without and with the callback. What we document to refuse or warn of is counted apart. This module is also the
pytest plugin that puts the callback in. The exit code is 1 if a test fails with it, and not without it, for any other
reason.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lightning_entropy as le

# With short loops, since Lightning's fits are short.
CALLBACKS: dict[str, Callable[[], le.InnerOuterCallback]] = {
    "entropy_sgd": lambda: le.EntropySGD(2, 0.1),
    "null": lambda: le.InnerOuterCallback(le.Relaxation()),
    "lookahead": lambda: le.InnerOuterCallback(le.lookahead(2)),
    "heat": lambda: le.HeatSmoothing(1, 1e4),
}
FOLDERS = ("callbacks", "checkpointing", "loops", "trainer", "tuner", "models", "core")
# What we document to refuse, or to warn of (Lightning's tests turn warnings into errors).
DOCUMENTED = (
    "strategy must keep whole parameters on every rank",
    "one object can drive the inner and outer loop of a Trainer",
    "a parameter must be in one optimizer",
    "optimizer must run torch's step hooks",
    "optimizer must be a torch.optim.Optimizer",
    "optimizer must have an 'lr' in every param group",
    "must not change its weights by eval\\(\\)",
    "the weights were modified while they were perturbed",
    "showed x to a validation: what was written is the new x",
    "two validations had the same weights",
    "lr \\* gamma must be below",
    "LBFGS",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what :func:`run` gives."""
    parser.addoption("--put-callback", default="", help="a key of CALLBACKS, put into every Trainer")
    parser.addoption("--outcomes", required=True, help="file for the outcome of every test, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Put the callback into every Trainer that is made in this process, unless it has one of ours."""
    name = config.getoption("--put-callback")
    config.stash[_OUTCOMES] = {}
    if not name:
        return
    original = L.Trainer.__init__

    @functools.wraps(original)  # LightningCLI reads the signature
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("callbacks") or []
        given = list(given) if isinstance(given, list | tuple) else [given]
        if not any(isinstance(callback, le.InnerOuterCallback) for callback in given):
            kwargs["callbacks"] = [*given, CALLBACKS[name]()]
        original(self, *args, **kwargs)

    L.Trainer.__init__ = __init__  # type: ignore[method-assign]
    config.add_cleanup(lambda: setattr(L.Trainer, "__init__", original))


_OUTCOMES = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Note how every phase of a test ended; the worst stays."""
    report = yield
    outcomes = item.config.stash[_OUTCOMES]
    if report.failed:
        text = report.longreprtext
        documented = any(re.search(pattern, text) for pattern in DOCUMENTED)
        outcomes[item.nodeid] = "documented" if documented else f"failed: {text.strip().splitlines()[-1][:200]}"
    elif report.skipped:
        outcomes[item.nodeid] = "skipped"
    else:
        outcomes.setdefault(item.nodeid, "passed")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes down."""
    Path(session.config.getoption("--outcomes")).write_text(json.dumps(session.config.stash[_OUTCOMES]))


def run(tests: Path, name: str, arguments: Sequence[str]) -> dict[str, str]:
    """Run the tests in a process and return the outcome of each.

    Args:
        tests: the folder tests_pytorch.
        name: a key of CALLBACKS; "": without.
        arguments: more of pytest's.
    """
    folders = [str(tests / folder) for folder in FOLDERS if (tests / folder).exists()] or [str(tests)]
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch, "outcomes.json")
        plugin = ["-p", "tests.lightning_suite", f"--put-callback={name}", f"--outcomes={outcomes}"]
        # Lightning's tests import themselves as tests_pytorch, from the folder above.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *folders, *arguments]
        ended = subprocess.run(command, cwd=tests.parent, env={**os.environ, "PYTHONPATH": path}, check=False)
        if ended.returncode not in (0, 1):
            raise SystemExit(f"pytest must run, got exit code {ended.returncode}")
        found: dict[str, str] = json.loads(outcomes.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests without and with the callback, print the counts and what fails only with it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lightning_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tests", type=Path, help="the folder tests_pytorch of a checkout of Lightning")
    parser.add_argument("--callback", choices=CALLBACKS, default="entropy_sgd")
    parser.add_argument("pytest", nargs="*", help="pytest's arguments, after --")
    options = parser.parse_args(arguments)
    tests = options.tests.resolve()
    if not tests.is_dir():
        parser.error(f"tests must be a folder, got {options.tests}")
    without, with_ours = run(tests, "", options.pytest), run(tests, options.callback, options.pytest)
    for name, outcomes in (("without", without), (options.callback, with_ours)):
        counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
        print(f"{name}: {len(outcomes)} tests,", ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    new = {
        test: outcome
        for test, outcome in with_ours.items()
        if outcome.startswith("failed") and not without.get(test, "").startswith("failed")
    }
    print(f"failed with {options.callback} alone: {len(new)}", *(f"  {t}: {o}" for t, o in new.items()), sep="\n")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
