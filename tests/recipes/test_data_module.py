"""The data module: what is read, held out, normalised and drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.data import ImageData
from recipes.data import module as data_module
from recipes.data import sources as data_sources
from recipes.data.plan import INDEX
from tests.recipes.images import make_tree, tree_data


def test_a_folder_becomes_images_and_labels(tmp_path):
    data = tree_data(tmp_path)
    data.prepare_data()
    data.setup()
    assert data.classes == ["cat", "dog"]
    assert (len(data.train_dataloader()), len(data.test_dataloader())) == (3, 1)
    images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())))
    assert images.shape == (6, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = torch.from_numpy(np.array(Image.open(tmp_path / "tree/test/cat/0.png"))).permute(2, 0, 1)
    assert torch.equal((images[0] * data._normaliser.std + data._normaliser.mean).round().to(torch.uint8), first)


def test_evaluation_is_not_augmented(tmp_path):
    plain, augmented = tree_data(tmp_path), tree_data(tmp_path, flip=True, crop=3)
    batches = []
    for data in (plain, augmented):
        data.setup()
        batches.append(data.on_after_batch_transfer(next(iter(data.val_dataloader())))[0])
    assert torch.equal(*batches)


def test_a_grey_folder_has_one_channel(tmp_path):
    data = ImageData("folder", str(make_tree(tmp_path / "t", shape=(8, 8, 1))), cache=str(tmp_path / "c"), batch_size=2)
    data.setup()
    assert data.on_after_batch_transfer(next(iter(data.train_dataloader())))[0].shape == (2, 1, 8, 8)


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(data_module, "read", lambda *a: decoded.append(a) or data_sources.read(*a))
    for _ in range(2):
        tree_data(tmp_path).setup()
    assert len(decoded) == 1
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "tree/train/cat/0.png")
    tree_data(tmp_path).setup()
    assert len(decoded) == 2


def test_validation_is_held_out_of_training_and_the_same_for_every_seed():
    def sums(data, loader):
        return {int(image.long().sum()) for rows in loader for image in data._data.images[rows[:, INDEX]]}

    parts = []
    for seed in (0, 1):
        data = ImageData("random", n_train=100, n_val=50, seed=seed, batch_size=10)
        data.setup()
        parts.append([sums(data, loader()) for loader in (data.train_dataloader, data.val_dataloader)])
    assert parts[0] == parts[1]
    train, val = parts[0]
    # The sum of its pixels names an image, but for a few.
    assert (len(train) > 95, len(val) > 47, len(train & val) < 3) == (True, True, True)
    assert len(train & sums(data, data.test_dataloader())) < 10


def test_without_held_out_images_validation_is_the_test_set():
    data = ImageData("random")
    data.setup()
    assert torch.equal(next(iter(data.val_dataloader())), next(iter(data.test_dataloader())))


def test_more_images_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match=r"n_train \+ n_val must be at most the 512 training images of random, got 500 \+ 50"
    ):
        ImageData("random", n_train=500, n_val=50).setup()


@pytest.mark.parametrize(
    "bad",
    [{"source": "svhn"}, {"normalise": "none"}, {"batch_size": 0}, {"crop": -1}, {"n_train": 0}, {"n_val": -1}],
)
def test_arguments_are_checked(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        ImageData(**bad)


def test_whitening_is_cached_and_used(tmp_path):
    data = tree_data(tmp_path, normalise="gcn_zca")
    data.setup()
    assert len(list((tmp_path / "cache").glob("zca-*.pt"))) == 1
    again = tree_data(tmp_path, normalise="gcn_zca")
    again.setup()
    plan = next(iter(data.train_dataloader()))
    assert torch.equal(again.on_after_batch_transfer(plan)[0], data.on_after_batch_transfer(plan)[0])
