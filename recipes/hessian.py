"""The talk's Hessian slide: how many eigenvalues of a LeNet's Hessian are nearly zero.

``python -m recipes.hessian --root DIR`` trains the talk's LeNet of 47,658 weights with Adam, estimates its spectrum
from Hessian-vector products, and then trains the same net at 14 x 14 pixels (``--small``, 2,618 weights), for
which every eigenvalue can be computed and counted. The talk has 94 % within 1e-4 of zero on MNIST, of the exact Hessian
over 4,096 images, which takes a day and 256 GB; the data here is Fashion-MNIST, or MNIST with ``--data MNIST``.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import datasets

from lightning_entropy.diagnostics import HessianResult, hessian_spectrum
from recipes.limits import argument
from recipes.messages import Parser, run


def lenet(*, small: bool = False) -> nn.Module:
    """Build the talk's LeNet, 47,658 weights for 28 x 28 images, or its small sister of 2,618 for 14 x 14.

    Example:
        >>> [sum(p.numel() for p in lenet(small=s).parameters()) for s in (False, True)]
        [47658, 2618]
    """
    a, b, kernel, hidden, inside = (6, 12, 3, 32, 48) if small else (10, 20, 5, 128, 320)
    return nn.Sequential(
        nn.Conv2d(1, a, kernel),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(a, b, kernel),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(inside, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def images(root: Path, name: str, count: int, *, small: bool) -> tuple[Tensor, Tensor]:
    """Read the first ``count`` training images, scaled to [0, 1], halved in size for the small net."""
    data = getattr(datasets, name)(root, download=not (root / name / "raw").exists())
    x = data.data[:count, None].float() / 255
    return (nn.functional.avg_pool2d(x, 2) if small else x), data.targets[:count]


def train(net: nn.Module, x: Tensor, y: Tensor, *, epochs: int, seed: int) -> float:
    """Train with Adam in batches of 32, its rate falling to zero; return the share of errors."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return sum(int((net(a).argmax(1) != b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)) / len(x)


def study(options: argparse.Namespace, *, small: bool) -> HessianResult:
    """Train, measure and print."""
    torch.manual_seed(options.seed)
    net = lenet(small=small)
    x, y = images(options.root, options.data, options.images, small=small)
    start = time.perf_counter()
    error = train(net, x, y, epochs=options.epochs, seed=options.seed)
    trained = time.perf_counter()
    n = options.examples
    batches = list(zip(x[:n].split(512), y[:n].split(512), strict=True))
    dense_limit = 5000 if small else 0
    result = hessian_spectrum(
        net, batches, top=10, probes=options.probes, steps=options.steps, dense_limit=dense_limit, progress=True
    )
    low, high = result.near_zero(1e-4)
    share = f"{low:.1%}" if result.exact else f"between {low:.0%} and {high:.0%}"
    print(
        f"LeNet of {result.weights:,} weights, {error:.2%} training error, loss {result.loss:.4f}\n"
        f"  largest {result.largest:.4g}, smallest {result.smallest:.3g}, trace {result.trace}\n"
        f"  within 1e-4 of zero: {share} of eigenvalues\n"
        f"  {trained - start:.0f} s to train, {time.perf_counter() - trained:.0f} s to measure on {n:,} images"
    )
    if result.exact:
        near = [f"{bound:g}: {result.near_zero(bound)[0]:.1%}" for bound in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
        print("  within  " + ",  ".join(near))
    return result


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "python -m recipes.hessian", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the images are or go")
    parser.add_argument("--data", choices=("FashionMNIST", "MNIST"), default="FashionMNIST", help="the images")
    parser.add_argument("--images", type=argument(int, 1, 60_000), default=10_000, help="to train on")
    parser.add_argument("--epochs", type=argument(int, 1, 10**6), default=10, help="of training")
    parser.add_argument(
        "--examples", type=argument(int, 1, 60_000), default=512, help="images that the Hessian is averaged over"
    )
    parser.add_argument("--probes", type=argument(int, 1, 1000), default=4, help="random probes of the density")
    parser.add_argument("--steps", type=argument(int, 1, 1000), default=40, help="Lanczos steps of each probe")
    parser.add_argument("--seed", type=argument(int, 0, 2**32 - 1), default=0, help="of weights and batches")
    parser.add_argument("--small", action="store_true", help="the exact spectrum of the small net alone")
    parser.add_argument("--output", type=Path, default=Path("hessian.png"), help="the picture")
    options = parser.parse_args(args)

    from matplotlib.figure import Figure

    results = [study(options, small=small) for small in ((True,) if options.small else (False, True))]
    figure = Figure(figsize=(7 * len(results), 4.2), layout="constrained")
    for result, ax in zip(results, figure.subplots(1, len(results), squeeze=False)[0], strict=True):
        result.plot(ax)
    figure.savefig(options.output, dpi=120)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run(main)
