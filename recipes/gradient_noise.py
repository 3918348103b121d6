"""The talk's slide on the noise of SGD: lambda(D) and rank(D) of the small All-CNN on CIFAR-10.

``python -m recipes.gradient_noise --root DIR`` trains the All-CNN of 12 and 24 channels, 26,982 weights, by SGD
(batches of 128, momentum 0.9, GCN and ZCA, no dropout, no augmentation) and measures the diffusion matrix D of its
per-example gradients at 20, 40 and 100 % of training. The talk has lambda(D) = 0.27 +- 0.84 and rank(D) = 0.34 %, of
all 50,000 images after 50 epochs. A size for two cores: ``--images 10000 --epochs 10``; a tree of one folder per class
instead of torchvision's files: ``--source folder``.

What the clip does to that number: before taking mean and standard deviation, every eigenvalue below the largest times
26,982 times float32's epsilon, which is 0.32 % of the largest, is raised to that threshold, and 99.66 % of them are. So
the published mean is nearly the threshold itself: it says how large the largest eigenvalue is, not how loud the noise.
The unclipped numbers stand beside it.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics import GradientNoiseResult, gradient_noise
from recipes.allcnn import AllCNN
from recipes.data import ImageData
from recipes.limits import argument
from recipes.messages import Parser, run


class SmallAllCNN(L.LightningModule):
    """The limit-cycle paper's network and its training.

    Example:
        >>> sum(p.numel() for p in SmallAllCNN(epochs=1).parameters())
        26982
    """

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.net = AllCNN(width=12, input_dropout=0.0, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        """SGD at 0.1, divided by 5 at 60 and 80 % of training, weight decay 1e-4."""
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        drops = [round(0.6 * self.epochs), round(0.8 * self.epochs)]
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.2),
        }


class AtShares(L.Callback):
    """Measure D after 20, 40 and 100 % of the epochs."""

    def __init__(self, images: tuple[Tensor, Tensor], memory: float) -> None:
        self.images, self.memory = images, memory
        self.results: dict[int, GradientNoiseResult] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure where due, and print."""
        for share in (20, 40, 100):
            if trainer.current_epoch + 1 != max(1, round(share * trainer.max_epochs / 100)):
                continue
            start = time.perf_counter()
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            result = gradient_noise(pl_module, [self.images], lr=lr, batch_size=128, memory=self.memory, progress=True)
            self.results[share] = result
            with torch.no_grad():
                pl_module.eval()
                wrong = (pl_module(self.images[0]).argmax(1) != self.images[1]).float().mean().item()
                pl_module.train()
            print(
                f"after {share} %: loss {result.loss:.3f}, error {wrong:.1%}, {result.examples:,} images, "
                f"{time.perf_counter() - start:.0f} s\n"
                f"  talk's recipe  lambda(D) = {result.clipped_mean:.3g} +- {result.clipped_std:.3g}, "
                f"rank(D) = {result.rank_percent:.2f} % ({result.rank}), threshold {result.threshold:.3g}, "
                f"largest {result.eigenvalues[0]:.3g}\n"
                f"  unclipped      lambda(D) = {result.mean:.3g} +- {result.std:.3g}, trace {result.trace:.4g}, "
                f"stable rank {result.stable_rank:.3g}, participation {result.participation:.3g}\n"
                f"  noise scale {result.noise_scale} images, temperature {result.temperature:.2g}"
            )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "python -m recipes.gradient_noise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="where the images are or go")
    parser.add_argument("--source", default="cifar10", help="of recipes.data.ImageData")
    parser.add_argument("--images", type=argument(int, 1, 10**7), help="to train on; default all")
    parser.add_argument("--epochs", type=argument(int, 1, 10**6), default=50, help="of training")
    parser.add_argument("--examples", type=argument(int, 1, 10**7), default=2000, help="images that D is averaged over")
    parser.add_argument("--memory", type=argument(float, 0.001, 1024), default=1.0, help="GiB for gradients")
    parser.add_argument("--seed", type=argument(int, 0, 2**32 - 1), default=0, help="of weights and batches")
    parser.add_argument("--output", type=Path, default=Path("gradient_noise.png"), help="the picture")
    options = parser.parse_args(args)

    L.seed_everything(options.seed, verbose=False)
    data = ImageData(
        options.source, options.root, batch_size=128, normalise="gcn_zca", n_train=options.images, seed=options.seed
    )
    data.prepare_data()
    data.setup("fit")
    plan = torch.zeros(len(data.train_indices), 4, dtype=torch.int64)
    plan[:, 0] = data.train_indices
    chosen = torch.randperm(len(plan), generator=torch.Generator().manual_seed(0))[: options.examples]
    measured = AtShares(data.materialise(plan[chosen]), options.memory)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[measured],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(SmallAllCNN(options.epochs), datamodule=data)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(measured.results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measured.results), squeeze=False)[0]
    for (share, result), ax in zip(measured.results.items(), panels, strict=True):
        result.plot(ax)
        ax.set_title(f"after {share} % of training", fontsize=10)
    lows, highs = zip(*(ax.get_ylim() for ax in panels), strict=True)
    for ax in panels:
        ax.set_ylim(min(lows), max(highs))
    figure.savefig(options.output, dpi=110)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run(main)
