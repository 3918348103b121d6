"""How many calls of torch a step and an exchange make: on a GPU each is a kernel or more, at about 5 microseconds.

    python -m benchmarks.launches

Nothing is timed and no GPU is needed: calls are counted at ResNet-50's shapes, with the choices that a GPU's parameters
get, on the device "meta" for steps, and on the CPU for exchanges, of one replica with itself. Views and empty memory
are left out. Loops are short, as their length changes no count. Prints two Markdown tables.
"""

import contextlib

import torch
import torch.distributed as dist

import lightning_entropy as le
from benchmarks.command import Options
from benchmarks.update import resnet50
from lightning_entropy.strategies.compression import FORMATS
from lightning_entropy.strategies.exchange import Coupling
from lightning_entropy.strategies.links import Links
from tests.device_calls import Calls, as_on_a_gpu, rounded_by_kernels

INNER_STEPS = 8
METHODS = {
    "`lookahead()`": le.lookahead(INNER_STEPS),
    "`smoothed_lookahead()`": le.smoothed_lookahead(INNER_STEPS),
    "`entropy_sgd()`": le.entropy_sgd(INNER_STEPS),
    "`entropy_sgd(noise=0.0)`": le.entropy_sgd(INNER_STEPS, noise=0.0),
    "`hamilton_jacobi()`": le.hamilton_jacobi(INNER_STEPS),
    "`heat(width=0.1, scale='relative')`": le.heat(1, width=0.1, scale="relative"),
    "`heat(20, gamma=1e4)`": le.heat(INNER_STEPS, 1e4),
    "`two_timescale()`": le.two_timescale(),
    "`elastic_sgd()`": le.elastic_sgd(INNER_STEPS),
    "`local_sgd()`": le.local_sgd(INNER_STEPS),
    "`diloco()`": le.diloco(INNER_STEPS),
    "`streaming_diloco()`": le.streaming_diloco(INNER_STEPS),
    "`snoo()`": le.snoo(INNER_STEPS),
    "`palsgd()`": le.palsgd(INNER_STEPS),
    "`gpa()`": le.gpa(),
    "`parle()`": le.parle(INNER_STEPS),
}

Shapes = list[tuple[int, ...]]


def counts(shapes: Shapes, relaxation: le.Relaxation | None, dtype: torch.dtype) -> list[int]:
    """Count the calls of each step of a loop, the third: the ones before it make the state."""
    params = [torch.nn.Parameter(torch.empty(s, device="meta", dtype=dtype)) for s in shapes]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
    if relaxation is not None:
        le.relax(optimizer, relaxation, seed=0).prepare()
    steps = 1 if relaxation is None else relaxation.inner_steps
    found = []
    for step in range(3 * steps):
        for p in params:
            p.grad = torch.empty_like(p)
        with Calls() as calls:
            optimizer.step()
        if step >= 2 * steps:
            found.append(calls.counted.total())
    return found


def step_rows(shapes: Shapes) -> list[list[str]]:
    """Return, per method, the calls beyond the optimizer's own of a step and of one with an outer step."""
    rows = []
    for name, relaxation in METHODS.items():
        cells = [name]
        for dtype in (torch.float32, torch.bfloat16):
            own = counts(shapes, None, dtype)[0]
            # A mean of gradients withholds all but one from the optimizer, which then makes no call.
            *others, last = [max(count - own, 0) for count in counts(shapes, relaxation, dtype)]
            cells += [str(max(others)) if others else "", str(last)]
        rows.append(cells)
    return rows


def exchange_rows(shapes: Shapes) -> list[list[str]]:
    """Return, per format, the calls that begin an exchange and that use it. Needs a process group."""
    rows = []
    for format, compile in [*((f, False) for f in FORMATS), *((f, True) for f in FORMATS if f != "float32")]:
        cells = [f"{format}, `compile=True`" if compile else format]
        for dtype in (torch.float32, torch.bfloat16):
            coupling = Coupling(Links(1, 1), format=format, compile=compile)
            tensors = [torch.randn(s).to(dtype) for s in shapes]
            for _ in range(3):  # the first is in full precision, the second has no rounding error before it
                with rounded_by_kernels() as first, Calls() as begun:
                    wait = coupling(tensors)
                with rounded_by_kernels() as second, Calls() as used:
                    wait()
            cells += [
                str(begun.counted.total() + len(first.launched)),
                str(used.counted.total() + len(second.launched)),
            ]
        rows.append(cells)
    return rows


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *rows])


def main() -> None:
    """Run from the command line."""
    parser = Options(__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="with the first ten tensors alone")
    shapes = resnet50()[: 10 if parser.parse_args().small else None]
    own = [counts(shapes, None, dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    print(f"{len(shapes)} tensors; SGD with momentum itself makes {own[0]} calls ({own[1]} in bfloat16)\n")
    with as_on_a_gpu():
        rows = step_rows(shapes)
    print(table(["calls beyond the optimizer's", "a step", "an outer step", "bfloat16: a step", "an outer step"], rows))
    print()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(as_on_a_gpu())
        rows = exchange_rows(shapes)
    print(table(["calls of an exchange in", "begun", "used", "bfloat16 weights: begun", "used"], rows))


if __name__ == "__main__":
    main()
