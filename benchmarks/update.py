"""What an inner step costs beside the optimizers people use: time per gradient, without forward and backward.

    python -m benchmarks.update

Rounds are interleaved, so that other load on the machine affects everyone alike; a periodic method is timed over
whole periods. The unit is torch's SGD with momentum, foreach. Prints a Markdown table: median over the rounds of the
ratio to the unit of the same round, and its quartiles.
"""

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import pytorch_optimizer
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from tqdm import tqdm

import lightning_entropy as le
from benchmarks.command import Options

PERIOD = 20  # inner steps per timed period: whole outer steps of L = 20, whole periods of Lookahead's k = 5


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of the 161 parameters of ResNet-50: 25.6 M weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, width_in, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def wrn_16_4() -> list[tuple[int, ...]]:
    """Shapes of the parameters of Wide-ResNet-16-4 for 10 classes: 2.75 M weights."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    width_in = 16
    for width in (64, 128, 256):
        for block in range(2):
            shapes += [(width_in,), (width_in,), (width, width_in, 3, 3), (width,), (width,), (width, width, 3, 3)]
            if block == 0:
                shapes.append((width, width_in, 1, 1))
            width_in = width
    return [*shapes, (256,), (256,), (10, 256), (10,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Make parameters with gradients; nothing is trained."""
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def contenders() -> dict[str, tuple[Callable[..., Callable[[], None]], int]]:
    """Return, by name, a function that makes a step, and the number of gradient evaluations in that step."""
    sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    fused = partial(sgd, nesterov=True, weight_decay=5e-4, fused=True)

    def plain(make: Callable[..., torch.optim.Optimizer], params: list[torch.nn.Parameter]) -> Callable[[], None]:
        return make(params).step

    def ours(relaxation: le.Relaxation, compile: bool, params: list[torch.nn.Parameter]) -> Callable[[], None]:
        optimizer = fused(params)
        optimizer.loop = le.relax(optimizer, relaxation, seed=0, compile=compile)
        return optimizer.step

    def ema(params: list[torch.nn.Parameter]) -> Callable[[], None]:
        # The arithmetic of Lightning's EMAWeightAveraging: avg_fn, so tensor by tensor.
        model = torch.nn.ParameterList(params)
        average, optimizer = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999)), sgd(params, foreach=True)

        def step() -> None:
            optimizer.step()
            average.update_parameters(model)

        return step

    def lookahead(params: list[torch.nn.Parameter]) -> Callable[[], None]:
        return pytorch_optimizer.Lookahead(sgd(params, foreach=True), k=5, alpha=0.5).step

    def sam(params: list[torch.nn.Parameter]) -> Callable[[], None]:
        optimizer = pytorch_optimizer.SAM(params, torch.optim.SGD, rho=0.05, lr=1e-3, momentum=0.9, foreach=True)

        def step() -> None:
            optimizer.first_step()
            optimizer.second_step()

        return step

    quiet, noisy = le.entropy_sgd(20, 0.03, 0.0, 0.75), le.entropy_sgd(20, 0.03, 1e-4, 0.75)
    return {
        "torch SGD, momentum, foreach (the unit)": (partial(plain, partial(sgd, foreach=True)), 1),
        "torch SGD, Nesterov, weight decay, fused": (partial(plain, fused), 1),
        "torch AdamW, fused": (partial(plain, partial(torch.optim.AdamW, lr=1e-3, fused=True)), 1),
        "SGD foreach + EMA as Lightning's callback": (ema, 1),
        "pytorch-optimizer Lookahead, k = 5, SGD foreach": (lookahead, 1),
        "pytorch-optimizer SAM, SGD foreach": (sam, 2),
        "ours on SGD fused, no noise": (partial(ours, quiet, False), 1),
        "ours on SGD fused, noise": (partial(ours, noisy, False), 1),
        "ours on SGD fused, no noise, compile": (partial(ours, quiet, True), 1),
        "ours on SGD fused, noise, compile": (partial(ours, noisy, True), 1),
    }


def measure(shapes: list[tuple[int, ...]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Time every contender in every round: seconds per gradient evaluation."""
    steps = {name: (make(parameters(shapes)), evaluations) for name, (make, evaluations) in contenders().items()}
    for step, _ in steps.values():
        for _ in range(PERIOD):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    turns = [(name, *made) for _ in range(rounds) for name, made in steps.items()]
    # A bar on a terminal alone, between the measurements.
    for name, step, evaluations in tqdm(turns, unit="turn", leave=False, disable=None):
        start = time.perf_counter()
        for _ in range(PERIOD * repeats):
            step()
        times[name].append((time.perf_counter() - start) / (PERIOD * repeats * evaluations))
    return times


def main() -> None:
    """Run from the command line."""
    parser = Options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of all steps in turn")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {args.rounds}")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n"
    )
    for title, shapes, repeats in (("ResNet-50", resnet50(), 1), ("WRN-16-4", wrn_16_4(), 5)):
        times = measure(shapes, args.rounds, repeats)
        unit = next(iter(times.values()))
        weights = sum(torch.Size(s).numel() for s in shapes)
        print(f"{title}: {weights / 1e6:.2f} M weights in {len(shapes)} tensors, medians of {args.rounds} rounds\n")
        print("| step | ms per gradient | ratio | quartiles |\n| --- | --- | --- | --- |")
        for name, values in times.items():
            ratios = [v / u for v, u in zip(values, unit, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
            print(f"| {name} | {1e3 * statistics.median(values):.2f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
        print()


if __name__ == "__main__":
    main()
