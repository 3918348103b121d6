"""A tree of images, one folder per class, and the data module that reads it."""

import numpy as np
from PIL import Image

from recipes.data import ImageData


def make_tree(root, shape=(8, 8, 3), per_class=3, suffix="png"):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = rng.integers(256, size=shape).astype(np.uint8)
                Image.fromarray(image.squeeze()).save(folder / f"{i}.{suffix}")
    return root


def tree_data(tmp_path, **changes):
    root = tmp_path / "tree"
    if not root.exists():
        make_tree(root)
    return ImageData("folder", str(root), **{"batch_size": 2, "cache": str(tmp_path / "cache")} | changes)
