r"""Is it worth it? What a link does to replicas, in arithmetic.

    python -m lightning_entropy.plan --params 124M --replicas 4 --link 1Gbit --step 0.4s

``python -m benchmarks.communication`` measures it. One training step takes s seconds of computation. A ring all-reduce
of B bytes over R replicas sends 2 (R - 1) / R B from each, in 2 (R - 1) messages one after the other, so it takes

    c = 2 (R - 1) / R * 8 B / bandwidth  +  2 (R - 1) * latency.

Data-parallel training pays it every step, less what hides behind the backward pass, about two thirds of a step. Local
SGD and DiLoCo pay it whole, once in H steps. Parle and Elastic-SGD average what is known when a loop begins, so that it
hides behind the H steps of the loop. Utilisation is the share of the time in which a replica computes.
"""

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_entropy.strategies.compression import CODECS, FORMATS

BACKWARD = 2 / 3  # of a step, behind which data-parallel training hides its exchange


class Row(NamedTuple):
    """What one way to train costs.

    Attributes:
        method: its name.
        format: of what is sent.
        bytes_per_step: sent by a replica, per training step.
        utilisation: share of the time in which a replica computes, in (0, 1].
    """

    method: str
    format: str
    bytes_per_step: float
    utilisation: float


def bytes_per_weight(format: str) -> float:
    """Return how many bytes a weight takes in a format of ``communication_dtype``, with its scales.

    Example:
        >>> bytes_per_weight("float32"), bytes_per_weight("bfloat16"), round(bytes_per_weight("int8"), 3)
        (4.0, 2.0, 1.004)
    """
    codec, n = CODECS.get(format), 1 << 16
    return 4.0 if codec is None else codec[0](torch.zeros(1, n))[0].numel() / n


def exchange(payload: float, replicas: int, bandwidth: float, latency: float) -> tuple[float, float]:
    """Return the bytes that a replica sends in one ring all-reduce, and the seconds it takes.

    Args:
        payload: bytes of what is averaged.
        replicas: R >= 1.
        bandwidth: of each replica's link, bit/s; inf: no limit.
        latency: of a message, seconds.

    Example:
        >>> exchange(1e6, 2, 8e6, 0.1)
        (1000000.0, 1.2)
    """
    sent = 2 * (replicas - 1) / replicas * payload
    return sent, 8 * sent / bandwidth + 2 * (replicas - 1) * latency


def plan(
    params: float,
    replicas: int,
    *,
    bandwidth: float,
    step: float,
    latency: float = 0.0,
    inner_steps: Sequence[int] = (25, 100),
    gradient_bytes: float = 4.0,
) -> list[Row]:
    """Return what each way to train costs on a link.

    Args:
        params: number of weights.
        replicas: R >= 2, one on each end of a link.
        bandwidth: of a replica's link, bit/s, > 0.
        step: seconds of computation of a training step, > 0.
        latency: of a message, seconds, >= 0.
        inner_steps: H, for each of which there are rows.
        gradient_bytes: of a gradient's value in data-parallel training.

    Example:
        One second of exchange a step, of which two thirds of the step's 0.3 s hide:

        >>> rows = plan(1e6, 2, bandwidth=32e6, step=0.3, inner_steps=[10])
        >>> [(row.method, round(row.utilisation, 2)) for row in rows if row.format == "float32"]
        [('ddp', 0.27), ('DiLoCo, local SGD, H = 10', 0.75), ('Parle, Elastic-SGD, H = 10', 1.0)]
    """
    sent, seconds = exchange(gradient_bytes * params, replicas, bandwidth, latency)
    rows = [Row("ddp", "float32" if gradient_bytes == 4 else "half", sent, _share(step, seconds - BACKWARD * step))]
    for h in inner_steps:
        for format in FORMATS:
            sent, seconds = exchange(bytes_per_weight(format) * params, replicas, bandwidth, latency)
            rows.append(Row(f"DiLoCo, local SGD, H = {h}", format, sent / h, _share(h * step, seconds)))
            hidden = _share(h * step, seconds - h * step)
            rows.append(Row(f"Parle, Elastic-SGD, H = {h}", format, sent / h, hidden))
    return rows


def _share(computing: float, waiting: float) -> float:
    return computing / (computing + max(waiting, 0.0))


UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def count(text: str) -> float:
    """Read a number of weights: ``124M``, ``1.5B``, ``25600000``."""
    return _number(text, r"([kmbgt]?)", lambda unit: UNITS[unit], "a number of weights such as 124M")


def rate(text: str) -> float:
    """Read a bandwidth in bit/s: ``1Gbit``, ``100 Mbit/s``."""
    return _number(text, r"([kmgt]?)bit(?:/s|ps)?", lambda unit: UNITS[unit], "a bandwidth such as 1Gbit")


def duration(text: str) -> float:
    """Read seconds: ``0.4s``, ``20ms``."""
    return _number(text, r"(m?)s", lambda unit: 1e-3 if unit else 1.0, "a time such as 0.4s or 20ms")


def _number(text: str, pattern: str, factor: "object", words: str) -> float:
    found = re.fullmatch(rf"\s*([\d.]+(?:e[+-]?\d+)?)\s*{pattern}\s*", text.lower())
    try:
        value = float(found[1]) * factor(found[2])  # type: ignore[index,operator]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None
    return value


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| method | format | bytes a step | of ddp | utilisation |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        share = row.bytes_per_step / rows[0].bytes_per_step
        size = f"{row.bytes_per_step / 1e6:.3g} MB"
        lines.append(f"| {row.method} | {row.format} | {size} | {share:.2%} | {row.utilisation:.1%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_entropy.plan",
        usage="%(prog)s --params N --link RATE --step TIME [options; --help lists them]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=count, required=True, help="number of weights: 124M, 1.5B")
    parser.add_argument("--replicas", type=int, default=4, help="R >= 2 (default: 4)")
    parser.add_argument("--link", type=rate, required=True, help="bandwidth of each replica's link: 1Gbit, 100Mbit/s")
    parser.add_argument("--latency", type=duration, default=0.0, help="of a message: 20ms (default: 0)")
    parser.add_argument("--step", type=duration, required=True, help="computation of one training step: 0.4s, 40ms")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[25, 100], help="H (default: 25 100)")
    parser.add_argument("--gradient-bytes", type=float, default=4.0, help="of a gradient in ddp: 4 or 2 (default: 4)")
    options = parser.parse_args(arguments)
    if options.replicas < 2:
        parser.error(f"--replicas must be >= 2, got {options.replicas}")
    for name in ("params", "link", "step", "gradient_bytes"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {getattr(options, name)}")
    if min(options.inner_steps) < 1:
        parser.error(f"--inner-steps must be >= 1, got {min(options.inner_steps)}")
    rows = plan(
        options.params,
        options.replicas,
        bandwidth=options.link,
        step=options.step,
        latency=options.latency,
        inner_steps=options.inner_steps,
        gradient_bytes=options.gradient_bytes,
    )
    print(table(rows))


if __name__ == "__main__":
    main()
