"""A first run: SGD against three smoothings of the loss, on real handwritten digits that need no download.

    python -m recipes.quickstart
    python -m recipes.quickstart --data fashion-mnist --root DIR

An ordinary LightningModule, an ordinary Trainer, and one callback in its list: that is all that differs between the
rows. Every method gets the same number of gradient evaluations, the same learning rates, and the same BatchNorm
treatment.
"""

import logging
import time
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy
from tqdm import tqdm

import lightning_entropy as le
from recipes.limits import argument
from recipes.messages import Parser, run

METHODS = {
    "SGD": list,
    "EntropySGD": lambda: [le.EntropySGD()],
    "HamiltonJacobi": lambda: [le.HamiltonJacobi()],
    "HeatSmoothing": lambda: [le.HeatSmoothing()],
}
SIGMAS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
SHARPNESS_AT = 0.3
COLORS = dict(zip(METHODS, ["#4d4d4d", "#0072b2", "#d55e00", "#009e73"], strict=True))  # Okabe and Ito's palette

READING = """
Picture: {picture}

Test error and loss: smaller is better. Loss rise: of the training loss when every weight is moved by noise; smaller is
flatter. A difference within the standard deviations is chance. Next: docs/choose.md says which method when, and
recipes/README.md has longer comparisons."""


class ConvNet(L.LightningModule):
    """Three convolutions with BatchNorm, and a linear classifier: 24,058 weights on one grey channel."""

    def __init__(self, steps: int, lr: float = 0.1) -> None:
        super().__init__()
        self.steps, self.lr = steps, lr
        widths = [1, 16, 32, 64]
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
            for i, o in pairwise(widths)
        ]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, height, width) to logits (batch, 10)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log test loss and error in per cent."""
        images, labels = batch
        logits = self(images)
        accuracy = multiclass_accuracy(logits, labels, num_classes=10, average="micro")
        self.log_dict({"loss": nn.functional.cross_entropy(logits, labels), "error": 100 * (1 - accuracy)})

    def configure_optimizers(self) -> dict:
        """Nesterov SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class Curve(L.Callback):
    """Count gradients, and keep the test error after every epoch."""

    def __init__(self, bar: tqdm) -> None:
        self.errors: list[float] = []
        self.evaluations = 0
        self.bar = bar

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count one gradient."""
        self.evaluations += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the error."""
        self.errors.append(trainer.callback_metrics["error"].item())
        self.bar.update()


@dataclass
class Rows:
    """The results of one method, one entry per seed."""

    curves: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rises: list[list[float]] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels: 500 to train, 1,297 to test."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.tensor(labels)[order]
    return TensorDataset(x[:500], y[:500]), TensorDataset(x[500:], y[500:])


def fashion_mnist(root: str, train_size: int) -> tuple[TensorDataset, TensorDataset]:
    """Load the first ``train_size`` images of Fashion-MNIST, and its 10,000 test images; downloads what is missing."""
    from torchvision.datasets import FashionMNIST

    sets = []
    for train in (True, False):
        data = FashionMNIST(root, train=train, download=not (Path(root) / "FashionMNIST" / "raw").exists())
        x, y = data.data[:, None].float() / 255 - 0.286, data.targets
        sets.append(TensorDataset(x[:train_size], y[:train_size]) if train else TensorDataset(x, y))
    return sets[0], sets[1]


@torch.no_grad()
def loss_rise(module: ConvNet, data: TensorDataset, draws: int = 5) -> list[float]:
    """Measure E f(x + sigma |x|_rms N(0, I)) - f(x) on the training set, for every sigma of ``SIGMAS``.

    The noise is relative to the root mean square of each weight tensor, since BatchNorm makes the scale of the weights
    before it meaningless.
    """
    images, labels = (t[:2000] for t in data.tensors)
    module.eval()
    weights = [p.clone() for p in module.parameters()]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for sigma in SIGMAS:
        total = 0.0
        for _ in range(draws if sigma else 1):
            for p, w in zip(module.parameters(), weights, strict=True):
                p.copy_(w + sigma * w.square().mean().sqrt() * torch.randn(w.shape, generator=generator))
            total += nn.functional.cross_entropy(module(images), labels).item() / (draws if sigma else 1)
        losses.append(total)
    for p, w in zip(module.parameters(), weights, strict=True):
        p.copy_(w)
    return [loss - losses[0] for loss in losses]


def train(
    method: str, data: tuple[TensorDataset, TensorDataset], seed: int, epochs: int, rows: Rows, bar: tqdm
) -> None:
    """Train once and append the results to the method's rows."""
    L.seed_everything(seed, verbose=False)
    loaders = DataLoader(data[0], batch_size=50, shuffle=True, drop_last=True), DataLoader(data[1], batch_size=1000)
    module, curve = ConvNet(steps=epochs * len(loaders[0])), Curve(bar)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*METHODS[method](), le.RefreshBatchNorm(20), curve],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(module, *loaders)
    rows.seconds.append(time.perf_counter() - start)
    rows.curves.append(curve.errors)
    rows.losses.append(trainer.callback_metrics["loss"].item())
    rows.evaluations.append(curve.evaluations)
    rows.rises.append(loss_rise(module, data[0]))


def spread(values: list[float], digits: int) -> str:
    """Format mean +- standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def table(results: dict[str, Rows]) -> str:
    """Format the results as a Markdown table."""
    head = ["method", "test error %", "test loss", f"loss rise at noise {SHARPNESS_AT}", "gradients", "seconds"]
    at = SIGMAS.index(SHARPNESS_AT)
    lines = [
        [
            name,
            spread([c[-1] for c in rows.curves], 2),
            spread(rows.losses, 3),
            spread([r[at] for r in rows.rises], 3),
            f"{mean(rows.evaluations):.0f}",
            spread(rows.seconds, 1),
        ]
        for name, rows in results.items()
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def picture(results: dict[str, Rows]) -> Figure:
    """Draw test error against effective epochs, and loss rise against noise, with one standard deviation."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows in results.items():
        for axes, xs, series in (
            (left, range(1, len(rows.curves[0]) + 1), rows.curves),
            (right, SIGMAS, rows.rises),
        ):
            values = torch.tensor(series, dtype=torch.float64)
            middle = values.mean(0)
            axes.plot(xs, middle, color=COLORS[name], label=name, linewidth=1.8)
            if len(values) > 1:
                band = values.std(0)
                axes.fill_between(xs, middle - band, middle + band, color=COLORS[name], alpha=0.15, linewidth=0)
    left.set(xlabel="effective epochs", ylabel="test error (%)", yscale="log", title="Error")
    left.set_yticks([2, 5, 10, 20, 50, 100])
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    right.set(
        xlabel="noise σ, relative to each tensor's rms",  # noqa: RUF001
        ylabel="rise of the training loss",
        title="Sharpness at the end",
    )
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = Parser(
        "python -m recipes.quickstart", description="SGD against three smoothings of the loss, on a small conv net."
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits", help="to train on")
    parser.add_argument("--root", default="data", help="folder of the data sets (fashion-mnist)")
    parser.add_argument(
        "--train-size", type=argument(int, 1, 60_000), default=6000, help="training images used (fashion-mnist)"
    )
    parser.add_argument("--epochs", type=argument(int, 1, 10**6), default=40, help="passes over the data")
    parser.add_argument("--seeds", type=argument(int, 1, 1000), default=3, help="trainings of each method")
    parser.add_argument("--out", default="quickstart.png", help="where the picture goes")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    data = digits() if args.data == "digits" else fashion_mnist(args.root, args.train_size)
    results = {name: Rows() for name in METHODS}
    print(
        f"{len(METHODS)} methods, {args.seeds} seeds, {args.epochs} epochs each: a minute or two on two cores",
        flush=True,
    )
    with tqdm(total=len(METHODS) * args.seeds * args.epochs, unit="epoch", disable=None) as bar:
        for seed in range(args.seeds):
            for name, rows in results.items():
                bar.set_description(f"{name}, seed {seed}")
                train(name, data, seed, args.epochs, rows, bar)
    print(f"\n{args.data}, {args.epochs} epochs, {args.seeds} seeds (mean ± standard deviation)\n\n{table(results)}")
    picture(results).savefig(args.out, dpi=150)
    print(READING.format(picture=args.out))


if __name__ == "__main__":
    run(main)
