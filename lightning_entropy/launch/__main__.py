"""Train replicas that come and go on this machine, with a lighthouse of their own.

    python -m lightning_entropy.launch --replicas 4 --min-replicas 2 train.py ARGS

The script builds its Trainer with ``strategy=ElasticEntropyStrategy(..., membership="torchft")``, and every replica
runs it. One that dies is started again and joins the others. On a cluster, start a lighthouse and the jobs by its own
means instead.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("RUST_LOG", "error")  # before torchft is imported, which reads it once

from lightning_entropy.launch.jobs import Jobs, say, start
from lightning_entropy.strategies.torchft.internals import check_installed, open_lighthouse


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m lightning_entropy.launch",
        usage="%(prog)s --replicas N [options; --help lists them] train.py ARGS",
        description="Train replicas that come and go on this machine. One that dies is started again.",
    )
    found.add_argument("--replicas", type=at_least_one, required=True, help="how many")
    found.add_argument(
        "--devices", type=at_least_one, default=1, help="GPUs that a replica sees, where there are any (default: 1)"
    )
    found.add_argument("--min-replicas", type=at_least_one, default=1, help="fewer do not train (default: 1)")
    found.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="after which a silent replica is taken for dead (default: 2)",
    )
    found.add_argument(
        "--join-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for which a replica that is alive and late is waited for (default: 60)",
    )
    found.add_argument("-m", dest="module", action="store_true", help="the script is a module's name")
    found.add_argument("script", help="what every replica runs")
    found.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return found


def at_least_one(text: str) -> int:
    """Return an integer of the command line that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the replicas and return the exit status."""
    found = parser()
    options = found.parse_args(arguments)
    if options.min_replicas > options.replicas:
        found.error(f"--min-replicas must be at most --replicas, got {options.min_replicas} and {options.replicas}")
    if not options.module and not Path(options.script).is_file():
        found.error(f"the script must be a file, got {options.script}: there is none (-m takes a module's name)")
    check_installed()
    lighthouse, address = open_lighthouse(
        options.min_replicas, heartbeat_timeout=options.heartbeat_timeout, join_timeout=options.join_timeout
    )
    script = ["-m", options.script] if options.module else [options.script]
    with tempfile.TemporaryDirectory(prefix="lightning-entropy-") as folder:
        command = [sys.executable, *script, *options.arguments]
        jobs = start(command, options.replicas, options.devices, address, Path(folder))
        try:
            return Jobs(jobs, say, every=10.0 if sys.stderr.isatty() else 60.0).run()
        finally:
            lighthouse.shutdown()


if __name__ == "__main__":
    sys.exit(main())
