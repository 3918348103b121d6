"""Read a data set into uint8 tensors: torchvision's, a tree of one folder per class, or made-up images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS


class Images(NamedTuple):
    """A data set in memory: the training images first, then the test images.

    Attributes:
        images: uint8, [n_train + n_test, channels, height, width], 0 to 255.
        labels: int64, [n_train + n_test], each in [0, len(classes)).
        n_train: how many of them are training images.
        classes: names of the classes, in label order.
    """

    images: Tensor
    labels: Tensor
    n_train: int
    classes: list[str]


# name: (torchvision class, what must lie under root when there is no network)
TORCHVISION = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py/ (or cifar-10-python.tar.gz)"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python/ (or cifar-100-python.tar.gz)"),
    "mnist": (datasets.MNIST, "MNIST/raw/ with train-images-idx3-ubyte and its three companions (or their .gz)"),
    "fashion_mnist": (
        datasets.FashionMNIST,
        "FashionMNIST/raw/ with train-images-idx3-ubyte and its three companions (or their .gz)",
    ),
}

RANDOM = {"random": (3, 32, 32), "random_grey": (1, 28, 28)}

SOURCES = (*TORCHVISION, "folder", *RANDOM)


def read(source: str, root: str, download: bool = True) -> Images:
    """Read every image of a data set.

    Args:
        source: one of ``SOURCES``.
        root: folder that holds the data set; made by a download. Ignored by the random sources.
        download: fetch a torchvision data set that is not under ``root``.

    Raises:
        ValueError: if ``source`` is not one of ``SOURCES``, or an image cannot be read, or a class folder has no
        image. FileNotFoundError: if the data set is not under ``root`` and cannot be downloaded; says what to put
        where.

    Example:
        >>> read("random", root="").images.shape
        torch.Size([768, 3, 32, 32])
    """
    if source in TORCHVISION:
        return read_torchvision(source, root, download)
    if source == "folder":
        return read_folder(root)
    if source in RANDOM:
        return made_up(RANDOM[source])
    raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source}")


def fingerprint(source: str, root: str) -> str:
    """Return 16 hexadecimal digits that change with the content of a data set.

    A folder is named by the path, size and modification time of every file in it, so that a changed image is read
    again. A torchvision data set, whose files have published checksums, is named by its source and place.
    """
    digest = hashlib.sha256(f"{source}\0{Path(root).resolve()}".encode())
    if source == "folder":
        for path in sorted(p for p in Path(root).rglob("*") if p.is_file()):
            stat = path.stat()
            digest.update(f"\0{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def read_torchvision(source: str, root: str, download: bool) -> Images:
    """Read one of torchvision's data sets, downloading it if it is not there.

    Raises:
        FileNotFoundError: if it is not under ``root`` and cannot be downloaded.
        ValueError: if its files are damaged; names their folder.
    """
    kind, needed = TORCHVISION[source]
    try:
        train, test = _torchvision_splits(kind, root, download)
    except Exception as error:  # RuntimeError; from the network URLError, an OSError; from a damaged file, anything
        if _is_there(kind, root):
            folder = Path(root).resolve() / needed.partition("/")[0]
            raise ValueError(
                f"the files of {source} in {folder} must be whole, got {type(error).__name__} from reading them "
                f"({error}): delete the folder, and they are unpacked or downloaded again"
            ) from error
        if not isinstance(error, RuntimeError | OSError):
            raise
        why = f"its download failed ({error})" if download else "download is off"
        raise FileNotFoundError(
            f"root must hold {source}, got {root}: it is not there and {why}. "
            f"{'Put' if download else 'Turn it on, or put'} {needed} into {Path(root).resolve()}; the source random "
            "is for a try without data"
        ) from error
    images = torch.cat([_channels_first(train.data), _channels_first(test.data)])
    labels = torch.cat([torch.as_tensor(train.targets), torch.as_tensor(test.targets)])
    return Images(images, labels, len(train), list(train.classes))


def read_folder(root: str) -> Images:
    """Read ``root/train/<class>/*`` and ``root/test/<class>/*``, all of one size, grey or colour as the first image is.

    Raises:
        FileNotFoundError: if ``root`` has no ``train`` and ``test``.
        ValueError: if the classes of the two differ, or a class has no image, or an image is corrupt or of another
        size.
    """
    splits = [Path(root) / "train", Path(root) / "test"]
    if not all(split.is_dir() for split in splits):
        raise FileNotFoundError(f"root must hold train/ and test/, with one folder per class in each, got {root}")
    classes, test_classes = ([p.name for p in sorted(split.iterdir()) if p.is_dir()] for split in splits)
    if not classes or classes != test_classes:
        raise ValueError(f"train/ and test/ of {root} must hold the same classes, got {classes} and {test_classes}")
    paths, labels, n_train = [], [], 0
    for split in splits:
        n_train = len(paths)
        for label, name in enumerate(classes):
            found = sorted(p for p in (split / name).iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                raise ValueError(f"every class must have an image, got none in {split / name}")
            paths += found
            labels += [label] * len(found)
    first = _decode(paths[0], None)
    mode = "L" if first.ndim == 2 else "RGB"
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for row, path in zip(images, paths, strict=True):
        image = _decode(path, mode)
        if image.shape != first.shape:
            raise ValueError(
                f"every image must have the size of {paths[0]}, {first.shape}, got {image.shape} in {path}"
            )
        row[...] = image
    return Images(_channels_first(images), torch.tensor(labels), n_train, classes)


def made_up(shape: tuple[int, int, int], n_train: int = 512, n_test: int = 256, n_classes: int = 10) -> Images:
    """Make images that a net can learn, always the same: each class has a pattern, each image its pattern and noise."""
    rng = np.random.default_rng(0)
    labels = torch.arange(n_train + n_test) % n_classes
    patterns = rng.integers(64, 192, size=(n_classes, *shape))
    noise = rng.integers(-64, 64, size=(n_train + n_test, *shape))
    images = torch.from_numpy((patterns[labels.numpy()] + noise).astype(np.uint8))
    return Images(images, labels, n_train, [str(label) for label in range(n_classes)])


def _torchvision_splits(kind: type, root: str, download: bool) -> list:
    try:
        # A root that cannot be written to is fine as long as the files are there.
        return [kind(root=root, train=train, download=False) for train in (True, False)]
    except RuntimeError:
        if not download:
            raise
    return [kind(root=root, train=train, download=True) for train in (True, False)]


def _is_there(kind: Any, root: str) -> bool:
    """Whether torchvision would find all files, whatever is in them."""
    if hasattr(kind, "resources"):  # of the MNIST family, unpacked
        folder, names = Path(root) / kind.__name__ / "raw", [Path(archive).stem for archive, _ in kind.resources]
    else:
        folder, names = Path(root) / kind.base_folder, [name for name, _ in [*kind.train_list, *kind.test_list]]
    return all((folder / name).is_file() for name in names)


def _decode(path: Path, mode: str | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would cut off what is above 255
                raise ValueError(f"its numbers have more than 8 bits, mode {image.mode}")
            return np.asarray(image.convert(mode or ("L" if image.mode in ("1", "L") else "RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise ValueError(f"every image must be readable, got {path} ({error})") from error


def _channels_first(images: Tensor | np.ndarray) -> Tensor:
    images = torch.as_tensor(images)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous()
