"""The LightningDataModule of the recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from recipes.data.augment import draw
from recipes.data.cache import cached
from recipes.data.normalise import MeanStd, Whiten
from recipes.data.plan import INDEX, EvaluationPlan, PlanLoader, TrainingPlan
from recipes.data.sources import RANDOM, SOURCES, Images, fingerprint, read
from recipes.limits import check

Source = Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "folder", "random", "random_grey"]


class ImageData(L.LightningDataModule):
    """Images of a small data set, decoded once, drawn and augmented on the device.

    A loader hands out plans, a few integers for each image; the batch (float32 images [n, channels, height, width],
    int64 labels [n]) is made from them on the device, in ``on_after_batch_transfer``. The same ``seed`` gives the
    same batches, whatever else draws random numbers; ranks of a strategy share each epoch as its
    ``distributed_sampler_kwargs`` say, and a run resumed in the middle of an epoch draws the batches that were left.

    Args:
        source: ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist`` (torchvision's), ``folder``
            (``root/train/<class>/*`` and ``root/test/<class>/*``), or ``random`` and ``random_grey`` (made up, for a
            try without data).
        root: folder of the data set.
        batch_size: training images in a batch of one rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        normalise: ``mean_std`` by channel, or ``gcn_zca``, the papers' contrast normalisation and whitening. Fitted
            to the training images, those of ``n_train`` only.
        flip: flip half of the training images left to right.
        crop: pixels of reflection around a training image before a window of its size is cut; 0 is none.
        replacement: draw every batch uniformly from all training images, as the papers' code does, instead of each
            image once an epoch.
        n_train: train on this many of the training images, the same ones for every ``seed``; None is all that
            ``n_val`` leaves.
        n_val: training images held out for validation. 0 validates on the test images, as the papers' curves do.
        wrong_labels: share of the training images whose label is another class's, in [0, 1]; the same ones for every
            ``seed``, and none of those held out.
        seed: names the order and the augmentation.
        cache: folder for the decoded tensors; None is ``$XDG_CACHE_HOME/lightning_entropy`` or
            ``~/.cache/lightning_entropy``.
        download: let torchvision fetch what is not under ``root``.

    Raises:
        ValueError: if a number is out of its range, or ``source`` or ``normalise`` is unknown.
    """

    def __init__(
        self,
        source: Source = "cifar10",
        root: str = "data",
        *,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        normalise: Literal["mean_std", "gcn_zca"] = "mean_std",
        flip: bool = False,
        crop: int = 0,
        replacement: bool = False,
        n_train: int | None = None,
        n_val: int = 0,
        wrong_labels: float = 0.0,
        seed: int = 0,
        cache: str | None = None,
        download: bool = True,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source}")
        if normalise not in ("mean_std", "gcn_zca"):
            raise ValueError(f"normalise must be mean_std or gcn_zca, got {normalise}")
        for name, value, least, most in (
            ("batch_size", batch_size, 1, 10**6),
            ("eval_batch_size", eval_batch_size, 1, 10**6),
            ("crop", crop, 0, 1000),
            ("n_train", 1 if n_train is None else n_train, 1, 10**7),
            ("n_val", n_val, 0, 10**7),
            ("wrong_labels", wrong_labels, 0, 1),
            ("seed", seed, 0, 2**63 - 1),
        ):
            check(name, value, least, most)
        self.source = source
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.normalise = normalise
        self.flip = flip
        self.crop = crop
        self.replacement = replacement
        self.n_train = n_train
        self.n_val = n_val
        self.wrong_labels = wrong_labels
        self.seed = seed
        self.cache = Path(cache) if cache else _cache_folder()
        self.download = download
        self._data: Images | None = None
        self._fingerprint = ""
        self._on: dict[torch.device, tuple[Tensor, Tensor, torch.nn.Module]] = {}

    def prepare_data(self) -> None:
        """Download, decode and cache, once a node."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load the images and fit the normalisation.

        Raises:
            ValueError: if there are fewer training images than ``n_train`` and ``n_val`` ask for.
        """
        if self._data is not None:
            return
        data, self._fingerprint = self._load()
        n_train = data.n_train - self.n_val if self.n_train is None else self.n_train
        if n_train < 1 or n_train + self.n_val > data.n_train:
            asked = f"{'' if self.n_train is None else f'{n_train} + '}{self.n_val}"
            rule = "n_val must be below" if self.n_train is None else "n_train + n_val must be at most"
            raise ValueError(f"{rule} the {data.n_train} training images of {self.source}, got {asked}")
        # Not named by the seed: seeds are to differ in what they draw, not in what they draw from.
        order = torch.from_numpy(np.random.default_rng(0).permutation(data.n_train))
        train, val = order[:n_train], order[data.n_train - self.n_val :]
        kept = torch.cat([train, val, torch.arange(data.n_train, len(data.images))])
        labels = data.labels[kept]
        labels[:n_train] = mislabelled(labels[:n_train], self.wrong_labels, len(data.classes))
        self._data = Images(data.images[kept], labels, n_train, data.classes)
        self.train_indices, self.val_indices, self.test_indices = torch.arange(len(kept)).split(
            [n_train, self.n_val, len(kept) - n_train - self.n_val]
        )
        self._normaliser = self._fit_normaliser(self._data.images[:n_train])

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in label order; known after ``setup``."""
        assert self._data is not None
        return self._data.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image; known after ``setup``."""
        assert self._data is not None
        channels, height, width = self._data.images.shape[1:]
        return channels, height, width

    def train_dataloader(self) -> PlanLoader:
        """Return the loader of training plans."""
        shared = self._sampler_kwargs()
        return PlanLoader(
            TrainingPlan(
                self.train_indices,
                batch_size=self.batch_size,
                flip=self.flip,
                crop=self.crop,
                replacement=self.replacement,
                seed=(self.seed, shared.pop("seed", 0)),
                **shared,
            )
        )

    def val_dataloader(self) -> PlanLoader:
        """Return the loader of the held-out images, or of the test images if none are held out."""
        return self._evaluate(self.val_indices if self.n_val else self.test_indices)

    def test_dataloader(self) -> PlanLoader:
        """Return the loader of the test images."""
        return self._evaluate(self.test_indices)

    def predict_dataloader(self) -> PlanLoader:
        """Return the loader of the test images."""
        return self._evaluate(self.test_indices)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Turn a plan [n, 4] into images and labels on its device; what is not a plan stays as it is."""
        return self.materialise(batch) if isinstance(batch, Tensor) else batch

    def materialise(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """Draw, augment and normalise the images of a plan.

        Args:
            plan: int64 [n, 4], rows (index, flip, top, left), on the device where the batch is wanted.

        Returns:
            float32 images [n, channels, height, width] and int64 labels [n].
        """
        images, labels, normaliser = self._at(plan.device)
        return normaliser(draw(images, plan, self.crop)), labels[plan[:, INDEX]]

    def _evaluate(self, indices: Tensor) -> PlanLoader:
        shared = self._sampler_kwargs()
        shared.pop("seed", None)
        return PlanLoader(EvaluationPlan(indices, batch_size=self.eval_batch_size, crop=self.crop, **shared))

    def _sampler_kwargs(self) -> dict[str, int]:
        # What a Trainer would give to the DistributedSampler it makes for other loaders.
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return {name: kwargs[name] for name in ("num_replicas", "rank", "seed") if name in kwargs} if kwargs else {}

    @torch.no_grad()
    def _at(self, device: torch.device) -> tuple[Tensor, Tensor, torch.nn.Module]:
        if device not in self._on:
            assert self._data is not None
            images, labels = self._data.images.to(device), self._data.labels.to(device)
            normaliser = self._normaliser.to(device)
            if normaliser.ahead:
                images, normaliser = normaliser.whiten_all(images), torch.nn.Identity()
            self._on[device] = (images, labels, normaliser)
        return self._on[device]

    def _load(self) -> tuple[Images, str]:
        if self.source in RANDOM:
            return read(self.source, self.root), self.source
        name = fingerprint(self.source, self.root)
        path = self.cache / f"{self.source}-{name}.pt"
        return Images(*cached(path, lambda: tuple(read(self.source, self.root, self.download)))), name

    def _fit_normaliser(self, images: Tensor) -> MeanStd | Whiten:
        if self.normalise == "mean_std":
            return MeanStd.fit(images)
        path = self.cache / f"zca-{self.source}-{self._fingerprint}-{len(self.train_indices)}-{self.n_val}.pt"

        def fit() -> dict[str, Tensor]:
            return dict(Whiten.fit(images).state_dict())

        return Whiten(**(fit() if self.source in RANDOM else cached(path, fit)))


def mislabelled(labels: Tensor, share: float, classes: int) -> Tensor:
    """Return labels [n] of which a share, rounded to whole images, are another class's; always the same ones.

    Example:
        >>> (mislabelled(torch.zeros(10, dtype=torch.long), 0.3, 2)).sum()
        tensor(3)
    """
    draw = np.random.default_rng(0)
    chosen = draw.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.clone()
    labels[chosen] = (labels[chosen] + torch.from_numpy(draw.integers(1, classes, len(chosen)))) % classes
    return labels


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_entropy"
