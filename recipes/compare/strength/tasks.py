"""The development set: small tasks on which defaults may be chosen, and what is tried on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from recipes.compare.run import Task


@dataclass(frozen=True)
class Trial:
    """A task.

    Attributes:
        words: the task in a line.
        task: without the folder of its data.
    """

    words: str
    task: Task

    def at(self, root: str, folder: str | None) -> Task:
        """Return the task with its data's folder.

        Args:
            root: of torchvision's data sets.
            folder: of images to be taken in the place of CIFAR-10; None: CIFAR-10 itself.
        """
        data = dict(self.task.data)
        data["root"] = root
        if folder is not None and data["source"] == "cifar10":
            data |= {"source": "folder", "root": folder}
        return replace(self.task, data=data)


def _trial(words: str, net: str, epochs: int, *, net_args: Any, **data: Any) -> Trial:
    data = {"n_train": 4000, "n_val": 2000, "batch_size": 128, **data}
    task = Task(net=net, net_args=net_args, data=data, epochs=epochs, eval_images=2000)
    return Trial(words, task)


LENET: dict[str, Any] = {"net": "lenet", "net_args": {"dropout": 0.0}, "source": "fashion_mnist"}
RESNET: dict[str, Any] = {"net": "resnet", "net_args": {"width": 16}, "source": "cifar10"}
ALLCNN: dict[str, Any] = {"net": "allcnn", "net_args": {"width": 48}, "source": "cifar10"}

TRIALS: dict[str, Trial] = {
    "lenet": _trial("LeNet-BN, 4,000 images of Fashion-MNIST", epochs=30, **LENET),
    "lenet-wrong20": _trial("the same, a fifth of the labels wrong", epochs=30, wrong_labels=0.2, **LENET),
    "lenet-wrong40": _trial("the same, two fifths of the labels wrong", epochs=30, wrong_labels=0.4, **LENET),
    "lenet-few": _trial("LeNet-BN, 500 images of Fashion-MNIST", epochs=120, **(LENET | {"n_train": 500})),
    "resnet": _trial("ResNet-18 of width 16, 4,000 images of CIFAR-10, no augmentation", epochs=25, **RESNET),
    "resnet-wrong40": _trial("the same, two fifths of the labels wrong", epochs=25, wrong_labels=0.4, **RESNET),
    "allcnn": _trial("All-CNN-BN of width 48, 4,000 images of CIFAR-10, no augmentation", epochs=25, **ALLCNN),
}

BASELINE = "sgd"
LRS = (0.03, 0.1, 0.3)
WEIGHT_DECAYS = (5e-4, 2e-3, 8e-3)  # each with each rate

# Widths are tried side by side, since a default is one of them.
METHODS = (
    BASELINE,
    "stopped",
    "smoothed_labels",
    "ema",
    "swa",
    "sam:rho=0.1",
    "sam:rho=0.2,start=0.88",
    "lookahead:inner_steps=20,outer_lr=0.3",
    "heat:width=0.05,scale=relative",
    "heat:width=0.1,scale=relative",
    "heat:width=0.2,scale=relative",
    "smoothed_lookahead:width=0.05",
    "smoothed_lookahead:width=0.1",
    "smoothed_lookahead:width=0.2",
    "entropy_sgd",
)
