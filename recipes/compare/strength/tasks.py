"""The development set: small tasks on which defaults may be chosen, and what is tried on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from recipes.compare.run import Task


@dataclass(frozen=True)
class Trial:
    """A task.

    Attributes:
        words: the task in a line.
        task: without the folder of its data.
        lrs: learning rates that every method tries.
        weight_decays: that it tries with each of them.
    """

    words: str
    task: Task
    lrs: Sequence[float]
    weight_decays: Sequence[float]

    def at(self, root: str, folder: str | None, precision: str = "32-true") -> Task:
        """Return the task with its data's folder.

        Args:
            root: of torchvision's data sets.
            folder: of images to be taken in the place of CIFAR-10; None: CIFAR-10 itself.
            precision: the Trainer's.
        """
        data = dict(self.task.data)
        data["root"] = root
        if folder is not None and data["source"] == "cifar10":
            data |= {"source": "folder", "root": folder}
        return replace(self.task, data=data, precision=precision)


def _trial(words: str, net: str, epochs: int, *, net_args: Any, optimizer: str = "sgd", **data: Any) -> Trial:
    data = {"n_train": 4000, "n_val": 2000, "batch_size": 128, **data}
    task = Task(net=net, net_args=net_args, data=data, epochs=epochs, eval_images=2000, optimizer=optimizer)
    return Trial(words, task, LRS[optimizer], WEIGHT_DECAYS[optimizer])


LRS = {"sgd": (0.01, 0.03, 0.1), "adamw": (1e-3, 3e-3, 1e-2)}
# Each with each rate. On wrong labels SGD wants the largest decay, stopped in time the smallest rate as well: methods
# looked 16 points better without the one, and two without the other.
WEIGHT_DECAYS = {"sgd": (2e-3, 8e-3, 3.2e-2), "adamw": (0.1, 0.5, 2.0)}


MLP: dict[str, Any] = {"net": "mlp", "net_args": {}, "source": "fashion_mnist"}
LENET: dict[str, Any] = {"net": "lenet", "net_args": {"dropout": 0.0}, "source": "fashion_mnist"}
RESNET: dict[str, Any] = {"net": "resnet", "net_args": {"width": 16}, "source": "cifar10"}
ALLCNN: dict[str, Any] = {"net": "allcnn", "net_args": {"width": 48}, "source": "cifar10"}

TRIALS: dict[str, Trial] = {
    "mlp": _trial("a fully connected net, 4,000 images of Fashion-MNIST", epochs=30, **MLP),
    "mlp-wrong40": _trial("the same, two fifths of the labels wrong", epochs=30, wrong_labels=0.4, **MLP),
    "mlp-adamw": _trial("the fully connected net by AdamW, which `sgd` is alone", epochs=30, optimizer="adamw", **MLP),
    "mlp-adamw-wrong40": _trial(
        "the same, two fifths of the labels wrong", epochs=30, optimizer="adamw", wrong_labels=0.4, **MLP
    ),
    "lenet": _trial("LeNet-BN, 4,000 images of Fashion-MNIST", epochs=30, **LENET),
    "lenet-wrong20": _trial("the same, a fifth of the labels wrong", epochs=30, wrong_labels=0.2, **LENET),
    "lenet-wrong40": _trial("the same, two fifths of the labels wrong", epochs=30, wrong_labels=0.4, **LENET),
    "lenet-few": _trial("LeNet-BN, 500 images of Fashion-MNIST", epochs=120, **(LENET | {"n_train": 500})),
    "resnet": _trial("ResNet-18 of width 16, 4,000 images of CIFAR-10, no augmentation", epochs=25, **RESNET),
    "resnet-wrong40": _trial("the same, two fifths of the labels wrong", epochs=25, wrong_labels=0.4, **RESNET),
    "allcnn": _trial("All-CNN-BN of width 48, 4,000 images of CIFAR-10, no augmentation", epochs=25, **ALLCNN),
    "allcnn-wrong40": _trial("the same, two fifths of the labels wrong", epochs=25, wrong_labels=0.4, **ALLCNN),
}

BASELINE = "sgd"  # a method without a line of its own: the task's optimizer alone

# The baselines that a sceptic would ask for, and ours as they are without an argument.
METHODS = (
    BASELINE,
    "stopped",
    "smoothed_labels",
    "ema",
    "ema:final=1",
    "swa",
    "sam:rho=0.1",
    "sam:rho=0.2,start=0.88",
    "lookahead",
    "heat",
    "smoothed_lookahead",
    "entropy_sgd",
    "hamilton_jacobi",
    "ddp",
    "elastic_sgd",
    "elastic_entropy",
)
