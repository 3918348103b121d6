"""Time eigenvalues, density and trace against hessian-eigenthings and curvlinops; measure memory at 36.5 M weights.

``python -m benchmarks.diagnostics`` on a WRN-16-4 in eval mode, cross entropy, one batch; each system in interleaved
rounds, ratios of medians. ``--memory`` measures the growth of the process for the 36.5 M weights of a WRN-28-10
(as a multilayer perceptron of that size) instead, in about two minutes: ``memory`` GiB hold the vectors of Lanczos or
the gradients of examples, and copies of the weights (about four vectors) and activations come on top. Needs the
``benchmark`` extra, and nothing else running.

Equal accuracy: all five eigenvalues agree to 1e-4 of the largest, with the tolerance each offers, and with steps
doubled from 20 for a Lanczos that does not stop early; density and trace take the same number of Hessian-vector
products.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.command import Options
from lightning_entropy.diagnostics import hessian_spectrum


class Block(nn.Module):
    """A pre-activation residual block."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the two convolutions to the input."""
        y = self.bn1(x).relu()
        return self.skip(x) + self.conv2(self.bn2(self.conv1(y)).relu())


def wide_resnet(depth: int, width: int) -> nn.Module:
    """Build a WRN for 32 x 32 images of 10 classes."""
    blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    for before, after, stride in zip(channels, channels[1:], (1, 2, 2), strict=False):
        layers += [Block(before if i == 0 else after, after, stride if i == 0 else 1) for i in range(blocks)]
    head = [nn.BatchNorm2d(channels[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)]
    return nn.Sequential(*layers, *head)


def systems(net: nn.Module, batches: list, probes: int, steps: int) -> dict[str, dict[str, Callable[[], float]]]:
    """Return, for each task, what to call for each system; every call returns the number found."""
    from curvlinops import HessianLinearOperator, hutchinson_trace, lanczos_approximate_spectrum
    from hessian_eigenthings import HessianOperator, lanczos, spectral_density, supervised_loss, trace
    from scipy.sparse.linalg import eigsh

    loss = nn.CrossEntropyLoss()

    def theirs() -> HessianOperator:
        return HessianOperator(model=net, dataloader=batches, loss_fn=supervised_loss(loss))

    def linops() -> HessianLinearOperator:
        params = [p for p in net.parameters() if p.requires_grad]
        return HessianLinearOperator(net, loss, params, batches, check_deterministic=False)

    def slq_by_linops() -> float:
        # With the ends of the spectrum given, so that only the density's own products are timed.
        grid, _ = lanczos_approximate_spectrum(linops(), ncv=steps, num_repeats=probes, boundaries=(-10.0, 50.0))
        return float(grid.max())

    def ours(**settings: int | float) -> Callable:
        return lambda: hessian_spectrum(net, batches, dense_limit=0, **settings)  # type: ignore[arg-type]

    def thorough() -> torch.Tensor:
        # Its Lanczos takes as many steps as it is told to and does not stop early: the fewest that are enough.
        return lanczos(theirs(), k=5, which="LA", tol=1e-4, max_iter=enough[0]).eigenvalues.double().sort().values

    enough = [20]
    top = ours(top=5, bottom=0, probes=0, tolerance=1e-4)
    density = ours(top=0, bottom=0, probes=probes, steps=steps)
    truth = torch.from_numpy(top().eigenvalues.copy()).sort().values
    while enough[0] < 320 and (thorough() - truth).abs().max() > 1e-4 * truth.max():
        enough[0] *= 2
    mean = ours(top=0, bottom=0, probes=probes, steps=1)
    return {
        "top-5": {
            "ours": lambda: top().largest,
            "eigenthings": lambda: float(thorough().max()),
            "curvlinops + eigsh": lambda: float(eigsh(linops().to_scipy(), k=5, which="LA", tol=1e-4)[0].max()),
        },
        f"density, {probes} x {steps}": {
            "ours": lambda: density().largest,
            "eigenthings": lambda: float(
                spectral_density(theirs(), num_runs=probes, lanczos_steps=steps).raw_eigenvalues.max()
            ),
            "curvlinops": slq_by_linops,
        },
        f"trace, {probes} probes": {
            "ours": lambda: mean().trace.value,
            "eigenthings": lambda: float(trace(theirs(), num_matvecs=probes, method="hutchinson").estimate),
            "curvlinops": lambda: float(hutchinson_trace(linops(), num_matvecs=probes)),
        },
    }


def compare(options: argparse.Namespace) -> None:
    """Time every system in interleaved rounds, and print medians, ranges and ratios."""
    torch.manual_seed(0)
    net = wide_resnet(16, options.width).eval()
    size = sum(p.numel() for p in net.parameters())
    x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(0, 10, (options.batch,))
    batches = list(
        zip(x.split(options.batch // options.batches), y.split(options.batch // options.batches), strict=True)
    )
    print(
        f"WRN-16-{options.width}, {size:,} weights, {len(batches)} batches of {len(batches[0][0])}, "
        f"torch {torch.__version__}"
    )
    for task, calls in systems(net, batches, options.probes, options.steps).items():
        if options.tasks and task.split(",")[0] not in options.tasks:
            continue
        times: dict[str, list[float]] = {name: [] for name in calls}
        found = {}
        for _ in range(options.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                found[name] = call()
                times[name].append(time.perf_counter() - start)
        base = statistics.median(times["ours"])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(
                f"{task:20} {name:20} {median:8.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  "
                f"{median / base:5.2f} x ours  value {found[name]:.6g}"
            )


def memory(options: argparse.Namespace) -> None:
    """Measure the peak growth of a process for each estimator on 36.5 M weights, a fresh process for each."""
    from multiprocessing import get_context

    for estimator in (noise, curvature):
        process = get_context("spawn").Process(target=weigh, args=(estimator, options.gib))
        process.start()
        process.join()


def weigh(estimator: Callable[[nn.Module, list, float], str], gib: float) -> None:
    """Run an estimator within ``gib`` for its vectors, and print what the process grew by."""
    import resource

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 8654), nn.Tanh(), nn.Linear(8654, 3700), nn.Tanh(), nn.Linear(3700, 10))
    size = sum(p.numel() for p in net.parameters())
    batch = [(torch.randn(16, 512), torch.randint(0, 10, (16,)))]
    before, start = peak(), time.perf_counter()
    what = estimator(net, batch, gib)
    print(
        f"{what}: {size:,} weights, {size * 4 / 2**30:.3f} GiB a vector, memory={gib} GiB: grew by "
        f"{peak() - before:.2f} GiB in {time.perf_counter() - start:.0f} s"
    )


def noise(net: nn.Module, batch: list, gib: float) -> str:
    """Compute the diffusion matrix of the batch's examples."""
    from lightning_entropy.diagnostics import gradient_noise

    return f"gradient noise, {gradient_noise(net, batch, memory=gib).examples} examples"


def curvature(net: nn.Module, batch: list, gib: float) -> str:
    """Compute the largest eigenvalue to 1 % and two short probes, one after the other on a kept graph."""
    hessian_spectrum(net, batch, memory=gib, top=1, bottom=0, probes=2, steps=4, tolerance=1e-2)
    return "Hessian, largest eigenvalue and 2 probes of 4 steps"


if __name__ == "__main__":
    parser = Options(__doc__)
    parser.add_argument("--width", type=int, default=4, help="of the Wide-ResNet")
    parser.add_argument("--batch", type=int, default=32, help="examples of a batch")
    parser.add_argument("--batches", type=int, default=1, help="that the Hessian is of")
    parser.add_argument("--probes", type=int, default=4, help="of density and trace")
    parser.add_argument("--steps", type=int, default=10, help="Lanczos steps of a probe")
    parser.add_argument("--rounds", type=int, default=3, help="of all systems in turn")
    parser.add_argument(
        "--tasks", nargs="*", default=[], choices=("top-5", "density", "trace"), help="to time; none: all"
    )
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--gib", type=float, default=2.0, help="that --memory allows the estimators")
    warnings.simplefilter("ignore")
    chosen = parser.parse_args()
    memory(chosen) if chosen.memory else compare(chosen)
