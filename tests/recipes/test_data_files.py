"""What happens when files are not as they should be."""

import errno
import os
import resource
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.data import ImageData
from recipes.data import sources as data_sources
from recipes.data.cache import cached
from recipes.data.sources import Images
from tests.recipes.images import tree_data


def test_a_corrupt_image_is_named_and_leaves_no_cache(tmp_path):
    data = tree_data(tmp_path)
    bad = tmp_path / "tree/train/dog/1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"every image must be readable, got .*train/dog/1\.png"):
        data.prepare_data()
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_an_empty_class_folder_is_named(tmp_path):
    data = tree_data(tmp_path)
    for path in (tmp_path / "tree/test/dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"every class must have an image, got none in .*test/dog"):
        data.prepare_data()


def test_a_class_that_is_in_one_split_only_is_refused(tmp_path):
    data = tree_data(tmp_path)
    (tmp_path / "tree/train/bird").mkdir()
    with pytest.raises(ValueError, match="must hold the same classes"):
        data.prepare_data()


def test_an_image_of_another_size_is_named(tmp_path):
    data = tree_data(tmp_path)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "tree/train/dog/2.png")
    with pytest.raises(ValueError, match=r"got \(9, 8, 3\) in .*train/dog/2\.png"):
        data.prepare_data()


def test_a_wrong_root_says_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"root must hold train/ and test/.*got {tmp_path}/nowhere"):
        ImageData("folder", str(tmp_path / "nowhere"), cache=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_without_a_network_the_error_says_what_to_put_where(tmp_path, source, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    needed = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(source, "MNIST/raw")
    with pytest.raises(FileNotFoundError, match=f"its download failed.*[Pp]ut .*{needed}.* into {tmp_path}"):
        ImageData(source, str(tmp_path), cache=str(tmp_path / "cache")).prepare_data()
    with pytest.raises(FileNotFoundError, match="download is off"):
        ImageData(source, str(tmp_path), cache=str(tmp_path / "cache"), download=False).prepare_data()


def test_a_full_disk_leaves_no_cache(tmp_path):
    # A limit on the size of a file stands in for the disk: the write itself fails, in the middle.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cache must be writable, got .*images\.pt.*no part of it was kept"):
            cached(tmp_path / "images.pt", lambda: torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_writing_leaves_no_cache(tmp_path, monkeypatch):
    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "images.pt", lambda: torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    def full(content, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 960 vs 854")  # noqa: B904  as torch's writer does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"images\.pt .*No space left on device"):
        cached(tmp_path / "images.pt", lambda: torch.zeros(1))


def test_what_a_killed_process_left_is_swept_away_and_others_may_read(tmp_path):
    left, other, fresh = tmp_path / ".images.pt.x1", tmp_path / ".other.pt.x1", tmp_path / ".images.pt.x2"
    for path in (left, other, fresh):
        path.write_bytes(b"half")
    for path in (left, other):
        os.utime(path, (0, 0))
    mask = os.umask(0o022)
    try:
        cached(tmp_path / "images.pt", lambda: torch.zeros(1))
    finally:
        os.umask(mask)
    assert {path.name for path in tmp_path.iterdir()} == {"images.pt", other.name, fresh.name}
    assert stat.S_IMODE((tmp_path / "images.pt").stat().st_mode) == 0o644


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("source", ["fashion_mnist", "cifar10"])
def test_damaged_files_of_torchvision_are_named(tmp_path, source, size, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    if source == "cifar10":
        folder = tmp_path / "cifar-10-batches-py"
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    else:
        folder = tmp_path / "FashionMNIST"
        names = [f"raw/{s}-{k}" for s in ("train", "t10k") for k in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\0\x08\x01\0\0\0\x09"[:size])
    with pytest.raises(ValueError, match=f"the files of {source} in {folder} must be whole"):
        ImageData(source, str(tmp_path), cache=str(tmp_path / "cache")).prepare_data()


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    data = tree_data(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "tree/train/dog/2.png")
    with pytest.raises(ValueError, match=r"train/dog/2\.png \(its numbers have more than 8 bits, mode I"):
        data.prepare_data()


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "images.pt").write_bytes(b"not a cache")
    with pytest.raises(OSError, match=r"cache must be readable, got .*images\.pt.*delete it"):
        cached(tmp_path / "images.pt", lambda: None)


def test_torchvision_data_become_channels_first(monkeypatch, tmp_path):
    class Fake:
        classes = ("a", "b")

        def __init__(self, root, train, download):
            self.n = 3 if train else 2
            self.data = np.full((self.n, 4, 4, 3), self.n, np.uint8)
            self.targets = [0, 1, 0][: self.n]

        def __len__(self):
            return self.n

    monkeypatch.setitem(data_sources.TORCHVISION, "cifar10", (Fake, ""))
    images = data_sources.read("cifar10", str(tmp_path))
    assert isinstance(images, Images)
    assert images.images.shape == (5, 3, 4, 4)
    assert (images.n_train, images.labels.tolist(), images.classes) == (3, [0, 1, 0, 0, 1], ["a", "b"])
