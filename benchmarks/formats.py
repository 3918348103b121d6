"""What it costs to round weights for an exchange and to read them again, by ``communication_dtype``.

A replica rounds its values and its share of the sum, and reads the others' shares and the sum: per weight and round,
about one rounding of all weights and two readings. One thread; the formats take turns in every round.

    python -m benchmarks.formats
"""

import platform
import statistics
import time

import torch

from benchmarks.command import Options
from lightning_entropy.strategies.compression import BLOCK, CODECS


def measure(weights: int, rounds: int) -> dict[str, tuple[list[float], list[float], float]]:
    """Return, by format, the seconds of each rounding and of each reading, and bytes per weight."""
    values = torch.randn(1, weights)
    results: dict[str, tuple[list[float], list[float], float]] = {name: ([], [], 0.0) for name in CODECS}
    for _ in range(rounds + 1):
        for name, (encode, decode) in CODECS.items():
            start = time.perf_counter()
            packed, _ = encode(values)
            middle = time.perf_counter()
            decode(packed, weights).to(torch.float32)
            end = time.perf_counter()
            write, read, _ = results[name]
            results[name] = ([*write, middle - start], [*read, end - middle], packed.numel() / weights)
    return results


def main() -> None:
    """Run from the command line."""
    parser = Options((__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=int, default=4096 * BLOCK, help="to round")
    parser.add_argument("--rounds", type=int, default=15, help="of all formats in turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {platform.machine()}; {args.weights / 1e6:.1f} M weights\n")
    print("| format | bytes per weight | rounding, ns per weight | reading, ns per weight |\n| --- | --- | --- | --- |")
    for name, (write, read, size) in measure(args.weights, args.rounds).items():
        # The first of each has warmed up.
        times = [f"{1e9 * statistics.median(values[1:]) / args.weights:.2f}" for values in (write, read)]
        print(f"| {name} | {size:.3f} | {times[0]} | {times[1]} |")


if __name__ == "__main__":
    main()
