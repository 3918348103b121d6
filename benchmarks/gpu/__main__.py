"""Try everything on a GPU: tests, the cost of a step, images and tokens per second, accuracy. About an hour and a half.

    python -m benchmarks.gpu --budget 540 --out benchmarks/results
    python -m benchmarks.gpu --budget 540 --out benchmarks/results --data cifar10   # a folder of images for accuracy

Results are kept in ``OUT/<card>/results.jsonl``, a line for each piece of work, and shown in ``README.md`` and
``index.html`` beside it. Call it again until nothing is left: what is there is not done again. Nothing is downloaded.
``--small --device cpu`` tries the command itself, at sizes that mean nothing.
"""

import platform
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning
import torch

import lightning_entropy
from benchmarks.command import Options
from benchmarks.gpu import accuracy, replicas, speed, steps
from benchmarks.gpu.page import markdown, page
from benchmarks.gpu.record import Piece, Row, finished, run

ROOT = Path(__file__).parents[2]


def tested(small: bool) -> list[Row]:
    """Run the tests that need a GPU and return what pytest says last."""
    what = ["tests/test_lanes.py"] if small else ["-m", "cuda", "tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    lines = done.stdout.strip().splitlines()
    failed = [{"table": "tests that failed", "test": line[7:200]} for line in lines if line.startswith("FAILED ")]
    return [{"said": lines[-1] if lines else done.stderr[-200:], "exit status": done.returncode}, *failed]


def card(device: torch.device) -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def commit() -> str:
    """Return the commit of the checkout, if it is one."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = Options(__doc__)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for this call")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where results are kept")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu")
    parser.add_argument("--data", type=Path, help="train/ and test/ with a folder of images a class; default: made up")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds, to try this command")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be a device of this machine, got cuda, of which torch sees none")
    if options.budget <= 0:
        parser.error(f"--budget must be > 0, got {options.budget:g}")
    if options.data is not None and not (options.data / "train").is_dir():
        parser.error(f"--data must be a folder with train/ and test/, got {options.data}")
    pieces = [
        Piece("tests that need a GPU", 60 if options.small else 300, partial(tested, options.small)),
        *steps.pieces(device, options.small),
        *speed.pieces(device, options.small),
        *replicas.pieces(device, options.small),
        *accuracy.pieces(device, options.small, options.data),
    ]
    folder = options.out / re.sub(r"\W+", "-", card(device)).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    left = run(pieces, folder / "results.jsonl", options.budget)
    facts = {
        "device": card(device),
        "versions": f"torch {torch.__version__}, lightning {lightning.__version__}, "
        f"lightning_entropy {lightning_entropy.__version__} ({commit()}), Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "left": ", ".join(left) or "nothing",
    }
    kept = finished(folder / "results.jsonl")
    entries = [kept[piece.name] for piece in pieces if piece.name in kept]
    heading = f"lightning_entropy on {card(device)}"
    (folder / "README.md").write_text(markdown(heading, facts, entries))
    (folder / "index.html").write_text(page(heading, facts, entries))
    print(markdown(heading, facts, entries))
    if left:
        print(f"{len(left)} of {len(pieces)} pieces are left: the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
