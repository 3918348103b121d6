r"""Is it worth it? What a link does to replicas, in arithmetic.

    python -m lightning_entropy.plan --params 124M --replicas 4 --link 1Gbit --step 0.4s

``python -m benchmarks.communication`` measures it. One training step takes s seconds of computation. A ring all-reduce
of B bytes over R replicas sends 2 (R - 1) / R B from each, in 2 (R - 1) messages one after the other, so it takes

    c = 2 (R - 1) / R * 8 B / bandwidth  +  2 (R - 1) * latency.

Data-parallel training pays it every step, less what hides behind the backward pass, about two thirds of a step. Local
SGD and DiLoCo pay it whole, once in H steps. Parle and Elastic-SGD average what is known when a loop begins, so that it
hides behind the H steps of the loop. Streaming DiLoCo sends P parts in turn, each hidden behind the tau steps of its
delay, or behind the H / P from one part to the next where these are fewer: a link carries one part at a time. Parts
count as of one size; they are whole tensors, so that the largest may be larger.

Utilisation is the share of the time in which a replica computes. Peak is what it sends in one exchange, and "no wait
from" the bandwidth from which on it would wait for none.
"""

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_entropy.strategies.compression import CODECS, FORMATS

BACKWARD = 2 / 3  # of a step, behind which data-parallel training hides its exchange

ENOUGH = 0.9  # utilisation of ddp, above which replicas gain little


class Row(NamedTuple):
    """What one way to train costs.

    Attributes:
        method: its name.
        format: of what is sent.
        bytes_per_step: sent by a replica, per training step.
        utilisation: share of the time in which a replica computes, in (0, 1].
        peak: bytes that a replica sends in one exchange.
        bandwidth: bit/s from which on it waits for no exchange; inf: it waits on any link.
    """

    method: str
    format: str
    bytes_per_step: float
    utilisation: float
    peak: float
    bandwidth: float


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
    fragments: int = 4,
    delay: int = 4,
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
        fragments: P of Streaming DiLoCo, >= 1.
        delay: tau of Streaming DiLoCo, steps, >= 0. It has no row for an H that is not above.

    Example:
        One second of exchange a step, of which two thirds of the step's 0.3 s hide. A part's quarter of a second
        hides behind the 2.5 steps that there are to the next one's turn.

        >>> rows = plan(1e6, 2, bandwidth=32e6, step=0.3, inner_steps=[10])
        >>> for row in rows[:4]:
        ...     print(f"{row.method}: {row.utilisation:.2f}, {row.peak / 1e6} MB, {row.bandwidth / 1e6:.1f} Mbit/s")
        ddp: 0.27, 4.0 MB, 160.0 Mbit/s
        DiLoCo, local SGD, H = 10: 0.75, 4.0 MB, inf Mbit/s
        Streaming DiLoCo, H = 10, P = 4, tau = 4: 1.00, 1.0 MB, 10.7 Mbit/s
        Parle, Elastic-SGD, H = 10: 1.00, 4.0 MB, 10.7 Mbit/s
    """
    link = Link(replicas, bandwidth, latency, step)
    name = "float32" if gradient_bytes == 4 else "half"
    rows = [link.row("ddp", name, gradient_bytes * params, every=1, hidden=BACKWARD)]
    for h in inner_steps:
        for format in FORMATS:
            payload = bytes_per_weight(format) * params
            rows.append(link.row(f"DiLoCo, local SGD, H = {h}", format, payload, every=h, hidden=0))
            if delay < h:
                spaced = h / fragments
                method = f"Streaming DiLoCo, H = {h}, P = {fragments}, tau = {delay}"
                rows.append(link.row(method, format, payload / fragments, every=spaced, hidden=min(delay, spaced)))
            rows.append(link.row(f"Parle, Elastic-SGD, H = {h}", format, payload, every=h, hidden=h))
    return rows


class Link(NamedTuple):
    """A replica and its link: the arguments of :func:`plan`."""

    replicas: int
    bandwidth: float
    latency: float
    step: float

    def row(self, method: str, format: str, payload: float, *, every: float, hidden: float) -> Row:
        """Return the row of exchanges of ``payload`` bytes, one every so many steps, each hidden behind ``hidden``."""
        sent, seconds = exchange(payload, self.replicas, self.bandwidth, self.latency)
        _, late = exchange(payload, self.replicas, float("inf"), self.latency)
        spare = hidden * self.step - late
        needed = 8 * sent / spare if spare > 0 else float("inf")
        computing, waiting = every * self.step, max(seconds - hidden * self.step, 0.0)
        return Row(method, format, sent / every, computing / (computing + waiting), sent, needed)


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
    head = ["method", "format", "bytes a step", "of ddp", "utilisation", "peak", "no wait from"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        share = row.bytes_per_step / rows[0].bytes_per_step
        sizes = [f"{size / 1e6:.3g} MB" for size in (row.bytes_per_step, row.peak)]
        needed = "" if row.bandwidth == float("inf") else f"{row.bandwidth / 1e9:.3g} Gbit/s"
        lines.append([row.method, row.format, sizes[0], f"{share:.2%}", f"{row.utilisation:.1%}", sizes[1], needed])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def assumed(rows: Sequence[Row], params: float, link: Link) -> str:
    """Return what the table rests on, and how to read it.

    Args:
        rows: of the table.
        params: number of weights.
        link: of each replica.
    """
    return (
        f"{link.replicas} replicas, each on a link of {link.bandwidth / 1e9:g} Gbit/s with {1e3 * link.latency:g} ms a "
        f"message; {params / 1e6:g}M weights; {link.step:g} s of computation a step.\n"
        f"Every exchange is a ring all-reduce; ddp's, of {rows[0].format} gradients, hides behind 2/3 of a step.\n"
        "utilisation: share of the time in which a replica computes and does not wait. peak: what it sends in one\n"
        "exchange. no wait from: the bandwidth from which on exchanges hide behind computation; empty: they never do."
    )


def verdict(rows: Sequence[Row]) -> str:
    """Return in a line what ddp, DiLoCo and Parle make of the link, the latter two at the first H.

    Example:
        >>> said = verdict(plan(124e6, 4, bandwidth=1e9, step=0.4))
        >>> said.split(";")[0], said.split(";")[1]
        ('ddp would use 6.6% of the time to compute', ' DiLoCo, local SGD, H = 25 in int8 87.0%')
    """
    picked = [next(r for r in rows if r.format == "int8" and r.method.startswith(m)) for m in ("DiLoCo", "Parle")]
    others = "; ".join(f"{row.method} in {row.format} {row.utilisation:.1%}" for row in picked)
    said = f"ddp would use {rows[0].utilisation:.1%} of the time to compute; {others}."
    return f"{said} ddp hardly waits here: there is little speed to gain." if rows[0].utilisation > ENOUGH else said


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what is assumed, the table, and a verdict."""
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
    parser.add_argument("--fragments", type=int, default=4, help="P of Streaming DiLoCo (default: 4)")
    parser.add_argument(
        "--delay",
        type=int,
        default=4,
        help="tau of Streaming DiLoCo, steps; its rows are for each H above (default: 4)",
    )
    options = parser.parse_args(arguments)
    if options.replicas < 2:
        parser.error(f"--replicas must be >= 2, got {options.replicas}")
    for name in ("params", "link", "step", "gradient_bytes"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be > 0, got {getattr(options, name)}")
    for name, least in (("inner_steps", 1), ("fragments", 1), ("delay", 0)):
        found = getattr(options, name)
        found = min(found) if isinstance(found, list) else found
        if found < least:
            parser.error(f"--{name.replace('_', '-')} must be >= {least}, got {found}")
    rows = plan(
        options.params,
        options.replicas,
        bandwidth=options.link,
        step=options.step,
        latency=options.latency,
        inner_steps=options.inner_steps,
        gradient_bytes=options.gradient_bytes,
        fragments=options.fragments,
        delay=options.delay,
    )
    link = Link(options.replicas, options.link, options.latency, options.step)
    print(assumed(rows, options.params, link), table(rows), verdict(rows), sep="\n\n")


if __name__ == "__main__":
    main()
